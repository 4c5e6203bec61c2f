from types import SimpleNamespace

from roi_quantization.detection.runs.training_checkpoints import PeriodicCheckpoint


def best_in(folder):
    path = str(folder / "best.ckpt")
    paths = {"best_model_path": path, "kth_best_model_path": path, "last_model_path": ""}
    return paths | {"dirpath": str(folder), "best_k_models": {path: 1.0}}


def test_the_best_checkpoint_of_a_moved_run_is_found_and_other_folders_stay(tmp_path):
    before, here, elsewhere = tmp_path / "before", tmp_path / "here", tmp_path / "elsewhere"
    own = PeriodicCheckpoint(before, every_n_steps=1)
    callbacks = {own.state_key: own.state_dict(), "best": best_in(before), "of the user": best_in(elsewhere)}
    trainer = SimpleNamespace(ckpt_path=here / "step_0000001.ckpt")
    PeriodicCheckpoint(here, every_n_steps=1).on_load_checkpoint(trainer, None, {"callbacks": callbacks})
    assert callbacks["best"] == best_in(here)
    assert callbacks["of the user"] == best_in(elsewhere)


def test_the_best_checkpoint_of_another_run_is_not_this_ones(tmp_path):
    own = PeriodicCheckpoint(tmp_path / "other", every_n_steps=1)
    callbacks = {own.state_key: own.state_dict(), "best": best_in(tmp_path / "other")}
    trainer = SimpleNamespace(ckpt_path=tmp_path / "other" / "last.ckpt")
    PeriodicCheckpoint(tmp_path / "new", every_n_steps=1).on_load_checkpoint(trainer, None, {"callbacks": callbacks})
    assert callbacks["best"]["best_model_path"] == ""
