"""What is routed of a prompt: the question, whatever it is wrapped in."""

from __future__ import annotations

from typing import Any

import pytest

from dlplora.data.wrappers import wrapped
from dlplora.errors import GenerationError
from dlplora.inference.chat_formats import learn_markers
from dlplora.inference.prompt_routing import routed_questions
from dlplora.inference.prompting import prompt_tensors
from dlplora.inference.question import document_texts, question_of_messages, question_text, routed_tail
from dlplora.inference.text import prompt_batch
from dlplora.tasks.composite import composites
from dlplora.tasks.nano import nano_suite
from dlplora.types import PromptBatch

SYSTEM = "You are a helpful and precise assistant. Answer the user's question as well as you can. Be polite, and give short answers."
GERMAN = "Du bist ein Assistent. Antworte kurz.\n\nSei höflich."
TOOLS = 'You can call tools:\n[{"name": "weather", "parameters": {"city": "string"}}]\n\nAnswer with JSON when you call one.'
ASKED = "Max has a clamp. Which side does it go to by the shelf rule?\nAnswer:"
TOLD = "Please write in Zargi: the green cat drops the coat.\nAnswer:"

WRAPPERS = {
    "nothing": "{q}",
    "system text": SYSTEM + "\n\n{q}",
    "system text of several parts": GERMAN + "\n\n{q}",
    "tool schema": TOOLS + "\n\n{q}",
    "three shots": "Is it red?\nAnswer: yes\n\nIs it\n\nblue?\nAnswer: no\n\nGo.\nAnswer: on\n\n{q}",
    "system text and shots": SYSTEM + "\n\nIs it red?\nAnswer: yes\n\n{q}",
    "Alpaca": "Below is an instruction that describes a task.\n\n### Instruction:\n{q}\n\n### Response:\n",
    "Alpaca with an empty input": "Below is an instruction.\n\n### Instruction:\n{q}\n\n### Input:\n\n\n### Response:",
    "ChatML": "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
    "ChatML, no thinking": "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "ChatML, thinking": "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "ChatML without its tokens": "system\nBe brief.\nuser\n{q}\nassistant\n<think>\n\n</think>\n\n",
    "ChatML, several turns": "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "a tool has answered": "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\n"
    "<tool_response>\n4 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "Llama 2": "<s>[INST] <<SYS>>\n" + SYSTEM + "\n<</SYS>>\n\n{q} [/INST]",
    "Llama 2, second turn": "[INST] Hello? [/INST] Yes? </s><s>[INST] {q} [/INST]",
    "Mistral": "<s>[SYSTEM_PROMPT]" + SYSTEM + "[/SYSTEM_PROMPT][INST]{q}[/INST]",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM + "<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma": "<bos><start_of_turn>user\n" + SYSTEM + "\n\n{q}<end_of_turn>\n<start_of_turn>model\n",
    "Phi-3": "<|system|>\n" + SYSTEM + "<|end|>\n<|user|>\n{q}<|end|>\n<|assistant|>\n",
    "Phi-4": "<|im_start|>user<|im_sep|>{q}<|im_end|><|im_start|>assistant<|im_sep|>",
    "Vicuna": "A chat between a user and an assistant. USER: {q} ASSISTANT:",
    "Human and Assistant": "Human: {q}\n\nAssistant:",
    "OpenChat": "GPT4 Correct User: Hello?<|end_of_turn|>GPT4 Correct Assistant: Yes?<|end_of_turn|>GPT4 Correct User: {q}<|end_of_turn|>"
    "GPT4 Correct Assistant:",
    "Falcon": "System: " + SYSTEM + "\nUser: {q}\nFalcon:",
    "OpenAssistant": "<|prompter|>{q}<|endoftext|><|assistant|>",
    "H2O": "<|prompt|>{q}</s><|answer|>",
    "RedPajama": "<human>: {q}\n<bot>:",
    "EXAONE": "[|system|]" + SYSTEM + "[|endofturn|]\n[|user|]{q}\n[|assistant|]",
    "Alpaca in ChatML": "<|im_start|>user\nBelow is it.\n\n### Instruction:\n{q}\n\n### Response:\n<|im_end|>\n<|im_start|>assistant\n",
}  # fmt: skip


@pytest.mark.parametrize("question", [ASKED, TOLD], ids=["question mark", "none"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_question_is_found_in_its_wrapper(name: str, question: str) -> None:
    prompt = WRAPPERS[name].replace("{q}", question)
    assert question_text(prompt) == question
    assert routed_tail(question_text(prompt)) == question


PLAIN = {
    "no parts": "the cat sees ",
    "instruction and text": "Summarize the text.\n\nOne thing happened. Then another.",
    "announced": "Translate this into Zargi:\n\nIs it red?",
    "a cue alone": "Answer:",
    "several questions": f"{ASKED}\n\n{TOLD}\n\n{ASKED}",
    "numbered": "1. Who?\n\n2. Where?\n\nAnswers:",
    "marked": "[INST] Who? [/INST]\n\n[INST] Where? [/INST]",
    "words of a format inside a text": "The user asked. USER: is a word, and so is\nuser\nin a file. What is it?",
    "empty": "",
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_no_wrapper_stays_to_the_letter(name: str) -> None:
    assert question_text(PLAIN[name]) == PLAIN[name]


def test_a_system_text_before_several_questions() -> None:
    assert question_text(f"{SYSTEM}\n\n{TOLD}\n\n{ASKED}") == f"{TOLD}\n\n{ASKED}"


@pytest.mark.parametrize(
    "behind",
    [
        "\n\nAnswer:",
        " What do you think?",
        "\n\nThanks!",
        "\n\nCan you do that?",
        '\n\nReturn JSON: {"answer": ...}',
        "\n\nWhat is the answer?\n\nAnswer:",
    ],
)
@pytest.mark.parametrize("question", ["Describe the row: gray noodle.", "Who is it? Where?"])
def test_a_reroute_reads_the_question_whatever_stands_behind_it(question: str, behind: str) -> None:
    assert routed_tail(question + behind) == question + behind


def test_a_reroute_reads_the_last_of_questions_that_are_marked() -> None:
    assert routed_tail("1. Who?\n\n2. Where?\n\nAnswers:") == "Answers:"
    options = "Which one is a fruit?\n\n1. a car\n\n2. a plum\n\nAnswer:"
    assert routed_tail(options) == options
    assert routed_tail("[INST] Who? [/INST]\n\n[INST] Is it red? So? [/INST]") == "[INST] Is it red? So? [/INST]"


@pytest.mark.parametrize("end", ["</s>", "<|endoftext|>", "<eos>", "<｜end▁of▁sentence｜>", "</s> ", "\n"])
@pytest.mark.parametrize("names", [("USER", "ASSISTANT"), ("User", "Assistant"), ("Human", "AI")])
def test_a_turn_may_begin_directly_behind_the_end_of_another(names: tuple[str, str], end: str) -> None:
    user, other = names
    gap = " " if user == "USER" else "\n"
    prompt = f"A chat.{gap}{user}: What is the capital of France?{gap}{other}: Paris.{end}{user}: {ASKED}{gap}{other}:"
    assert question_text(prompt) == ASKED


OWN_WORDS = [
    "Summarise this log:\nUser: hi\nAssistant: hello\nUser: how are you?\nAssistant: fine",
    "Fix this code:\n\n```python\nprint('[INST] hello [/INST]')\n```",
    "You are asked to write this in Zargi: the cat sees the hat.\n\nKeep it short.",
    "Translate the following question into French.\n\nWhere is the cat?",
    "Rules: add one to each digit.\n\n3 5 7",
    "Please write in Zargi what this says.\n\nUser: is the cat at the gate?\nAssistant: no",
    "Explain <think>this tag</think> in one line",
    "What does <user>ann</user> mean in this XML?",
    "### Instruction:\nwrite\n### Response:\nHow do I format such rows?",
]


@pytest.mark.parametrize("text", OWN_WORDS)
def test_the_words_of_a_known_message_are_its_own(text: str) -> None:
    for content in (text, [{"type": "text", "text": text}], [{"text": text}], [text]):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        assert question_of_messages(messages) == text


def test_what_is_read_of_messages() -> None:
    said = [{"role": "user", "content": ASKED}]
    assert question_of_messages([*said, {"role": "user", "content": "Answer briefly."}]) == f"{ASKED}\n\nAnswer briefly."
    assert question_of_messages([*said, {"role": "assistant", "content": "No."}, {"role": "user", "content": " "}]) == ASKED
    assert question_of_messages([*said, {"role": "assistant", "content": "No."}, {"role": "user", "content": TOLD}]) == TOLD
    assert question_of_messages([{"role": "user", "content": f"Q: Who?\nA: Tom\n\nQ: {ASKED}\nA:"}]) == f"Q: {ASKED}\nA:"  # worked examples
    assert question_of_messages([{"role": "user", "content": WRAPPERS["ChatML"].replace("{q}", ASKED)}]) == ASKED  # rendered already
    with pytest.raises(GenerationError, match="has no text"):
        question_of_messages([{"role": "user", "content": [{"type": "text"}]}])


def test_an_instruction_before_worked_examples_of_a_message_stays() -> None:
    told = f"Write in Zargi.\n\nIs it red?\nAnswer: yes\n\n{ASKED}"
    assert question_of_messages([{"role": "user", "content": told}]) == told
    assert question_of_messages([{"role": "user", "content": f"<think>\nWell.\n</think>\n\n{ASKED}"}]) == ASKED


TAGS_AND_HEADINGS = {
    "xml": "<system>{s}</system>\n<user>{q}</user>\n<assistant>",
    "xml question": "<instructions>\n{s}\n</instructions>\n\n<question>\n{q}\n</question>",
    "markdown": "# Instructions\n{s}\n\n# Question\n{q}\n\n# Answer\n",
    "guanaco": "{s}### Human: {q}### Assistant:",
    "nemotron": "<extra_id_0>System\n{s}\n<extra_id_1>User\n{q}\n<extra_id_1>Assistant\n",
    "kimi": "<|im_system|>system<|im_middle|>{s}<|im_end|><|im_user|>user<|im_middle|>{q}<|im_end|><|im_assistant|>assistant<|im_middle|>",
    "phi-2": "{s}\nInstruct: {q}\nOutput:",
    "llama 3 without special tokens": "system\n\n{s}user\n\n{q}assistant\n\n",
    "internlm": "<s><|System|>:{s}\n<|User|>:{q}<eoh>\n<|Bot|>:",
    "Alpaca, second turn": "### Instruction:\nHello?\n\n### Response:\n4</s>### Instruction:\n{q}\n\n### Response:\n",
    "Baichuan": "{s}<reserved_106>{q}<reserved_107>",
    "open thought": "{q}\n<think>\nOkay, the user wants an answer here. The best way is",
}


@pytest.mark.parametrize("question", [ASKED, TOLD], ids=["question mark", "none"])
@pytest.mark.parametrize("name", TAGS_AND_HEADINGS)
def test_the_question_is_found_between_tags_and_headings(name: str, question: str) -> None:
    assert question_text(TAGS_AND_HEADINGS[name].replace("{s}", SYSTEM).replace("{q}", question)) == question


@pytest.mark.parametrize(
    "text",
    [
        "Explain this XML: <user>ann</user><question>who?</question> to me",
        "What does <think> mean in a prompt?",
        "# Output\nprint(1)\n# Input\nx = 2\nExplain this script.",
        "```python\n# Question\nx = 1\n# Answer\nprint(x)\n```",
        "# Question\nWhy?\n# Answer\nBecause.",
        "Explain <think>this tag</think> in one line",
        "What does this mean?\n```\n<think>\nfoo\n```",
        "Our system\n\nhas one user\n\nand it needs no other assistant",
    ],
)
def test_tags_and_headings_inside_a_text_are_its_own(text: str) -> None:
    assert question_text(text) == text


COAT, SEA = "the dog wants the old coat.", "Tom has a long text about the sea."
HYPOTHESIS, COLOUR = "The hypothesis is that Tom runs.", "Which colour is the sea here?"


@pytest.mark.parametrize("before", ["", "Spain is warm.\n\n", f"{SYSTEM}\n\n", f"{SYSTEM}\n", "You are a helpful assistant."])
@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        (f"Please write in Zargi: {COAT}", [COAT]),
        (f"Please write in Zargi.\n{COAT}", [COAT]),
        (f"Please write in Zargi:\n\n{COAT}", [COAT]),
        (f"{SEA}\n{HYPOTHESIS}", [SEA, HYPOTHESIS]),
        (f"{SEA}\n\n{COLOUR}", [SEA, COLOUR]),
        (f"{SEA}\n\n{COLOUR}\nAnswer:", [SEA, COLOUR]),
    ],
)
def test_all_of_a_known_document_and_its_instruction_are_read(prompt: str, fields: list[str], before: str) -> None:
    assert question_text(before + prompt, None, tuple(fields)) == prompt


def test_the_document_tells_what_belongs_to_the_question() -> None:
    passage = "Mia went to the garden with the blue lamp."
    known = document_texts({"passage": f"{passage}\n\nShe left it there on Monday.", "question": "Where is it?", "label": "yes"})
    prompt = f"Passage: {passage}\n\nShe left it there on Monday.\n\nQuestion: Where is it?\nAnswer:"
    for before in (
        "",
        "Read the passage.\n\n",
        f"{SYSTEM}\n\nPassage: Another one about a red boat and a dog.\n\nQuestion: Who?\nAnswer: Tom\n\n",
        SYSTEM,
    ):
        assert question_text(before + prompt, known=known) == prompt
    assert question_text(SYSTEM + TOLD, known=(TOLD,)) == TOLD  # lm-eval puts nothing between the two
    assert question_text(f"Be brief.\n{TOLD}", known=(TOLD,)) == TOLD
    assert question_text(f"{SYSTEM}\n\n{ASKED}", known=("nothing of this is in the context",)) == ASKED


def test_messages() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": ASKED}]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert question_of_messages(messages) == ASKED
    assert question_of_messages([*messages, {"role": "user", "content": "  "}]) == ASKED
    assert question_of_messages([{"role": "system", "content": "Only this."}]) == "Only this."
    assert question_of_messages([]) == ""


UNUSUAL_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}@@asks@@ {{ m.content }} @@end@@{% elif m.role == 'assistant' %}@@says@@ "
    "{{ m.content }}{% else %}@@system@@ {{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}@@says@@{% endif %}"
)


def test_the_markers_of_a_template_are_learned(tiny_tokenizer: Any) -> None:
    import copy

    assert learn_markers(tiny_tokenizer) is None
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = UNUSUAL_TEMPLATE
    markers = learn_markers(tokenizer)
    conversation = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TOLD}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert question_text(rendered, markers) == TOLD
    assert question_text(rendered) != TOLD
    # as text, as tokens, and as messages
    for prompts in (
        PromptBatch.from_texts([rendered], tokenizer),
        prompt_tensors(tokenizer, "cpu", None, PromptBatch.from_texts([rendered], tokenizer).input_ids, None, None)[2],
        prompt_batch([conversation], tokenizer),
    ):
        assert routed_questions(prompts, tokenizer, markers).texts == (TOLD,)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert learn_markers(tokenizer) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert learn_markers(tokenizer) is None


def test_special_tokens_of_a_template_are_seen_in_tokens(tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    ids = PromptBatch.from_texts([WRAPPERS["ChatML"].replace("{q}", TOLD)], tokenizer).input_ids
    assert prompt_tensors(tokenizer, "cpu", None, ids, None, None)[2].questions == (TOLD,)


def test_prompts_without_a_wrapper_are_handed_on(tiny_tokenizer: Any) -> None:
    plain = PromptBatch.from_texts([ASKED, "the cat sees"], tiny_tokenizer)
    assert routed_questions(plain, tiny_tokenizer, None) is plain
    mixed = routed_questions(
        PromptBatch.from_texts([ASKED, f"{SYSTEM}\n\n{TOLD}"], tiny_tokenizer, task_names=("a", "b")), tiny_tokenizer, None
    )
    alone = PromptBatch.from_texts([ASKED, TOLD], tiny_tokenizer)
    assert mixed.texts == alone.texts
    assert mixed.task_names == ("a", "b")
    assert mixed.input_ids.tolist() == alone.input_ids.tolist()


def test_nano_prompts_and_composites_are_routed_as_they_are() -> None:
    suite = nano_suite()
    for task in suite.tasks:
        for split in ("train", "validation", "test"):
            for item in task.items(split, 20):
                assert (
                    question_text(item.prompt)
                    == question_text(item.prompt, known=(item.prompt,))
                    == routed_tail(item.prompt)
                    == item.prompt
                )
    for reading in ("concat", "serial"):
        for composite in composites(suite, reading, 3, 10):
            assert question_text(composite.prompt) == composite.prompt


def test_training_noise_is_what_the_rule_takes_off() -> None:
    prompts = [ASKED, TOLD] * 50
    assert wrapped(prompts, 0.0, 0) == prompts
    noisy = wrapped(prompts, 1.0, 0)
    assert noisy == wrapped(prompts, 1.0, 0) != wrapped(prompts, 1.0, 1)
    assert all(plain in one and plain != one for plain, one in zip(prompts, noisy, strict=True))
    assert 30 < sum(one == plain for one, plain in zip(wrapped(prompts, 0.5, 0), prompts, strict=True)) < 70
    found = [question_text(one) for one in noisy]
    assert sum(one == plain for one, plain in zip(found, prompts, strict=True)) > 75  # a system text on the line before cannot be told
