"""Options of single roles in a profile: what they change, and what they leave alone."""

from dlplora.reproduce.artifacts import recipe_hash
from dlplora.reproduce.recipe import Setting

SLOW, FAST = "--model.init_args.optimizer.lr=1e-4", "--model.init_args.optimizer.lr=1e-2"


def test_options_of_a_role_come_after_those_of_its_kind_and_win() -> None:
    setting = Setting(options={"trained/mole": [SLOW], "trained": [FAST], "all": ["--trainer.accelerator=cpu"]})
    assert setting.extra("trained/mole") == ["--trainer.accelerator=cpu", FAST, SLOW]
    assert setting.extra("trained/xlora") == ["--trainer.accelerator=cpu", FAST]
    assert setting.extra("pool") == ["--trainer.accelerator=cpu"]
    assert setting.arguments("trained/mole")[-1] == SLOW


def test_options_of_one_role_change_only_its_own_recipe() -> None:
    plain, changed = Setting(options={"trained": [FAST]}), Setting(options={"trained": [FAST], "trained/mole": [SLOW]})
    hashes = {
        role: (recipe_hash(role, setting=plain), recipe_hash(role, setting=changed)) for role in ("trained/mole", "trained/xlora", "pool")
    }
    assert {role: one == other for role, (one, other) in hashes.items()} == {"trained/mole": False, "trained/xlora": True, "pool": True}
