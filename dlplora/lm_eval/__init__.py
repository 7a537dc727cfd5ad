"""Everything that uses lm-evaluation-harness: the model ``dlplora``, its arguments, and one evaluation as a function."""

CACHE_REFUSAL = (
    "--use_cache is refused with --model dlplora: lm-eval's response cache does not know the model, so one method would be "
    "answered with another's results. Leave it out; --cache_requests (prompts only) is safe."
)
