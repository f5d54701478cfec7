"""Checkpoints of every version, written by hand and evaluated on the command line: the same model gives the same loss,
whatever the container, the names, and the other fields with which its parameters are stored."""

from __future__ import annotations

import argparse
import pickle
import re
import sys
import types
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch


def check(world: Any, found: Any, wanted: Any) -> None:
    assert world.loss(found) == pytest.approx(world.loss(wanted), abs=1e-6)


@pytest.fixture(name="plain")
def plain_fixture(world: Any, by_hand: Any) -> Any:
    """(path of the plainest file, its parameters): a flat Namespace in the older container."""
    state = by_hand.plain_state()
    return world.save("plain.pt", by_hand.older(state)), state


def with_projection(state: Any) -> Any:
    """The names of fairseq 0.12."""
    renamed = {"decoder.embed_out": "decoder.output_projection.weight"}
    dropped = "decoder.embed_positions._float_tensor"
    return OrderedDict((renamed.get(key, key), value) for key, value in state.items() if key != dropped)


def fused(state: Any) -> Any:
    """One in_proj matrix and bias for query, key and value (in this order), as in 2018."""
    result = OrderedDict(state)
    for key in [key for key in state if ".q_proj." in key]:
        parts = [result.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")]
        result[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return result


def numbered_norms(state: Any) -> Any:
    """Layer norms by number and a stored table of positions."""
    names = {"self_attn_layer_norm": "layer_norms.0", "final_layer_norm": "layer_norms.2"}
    result = OrderedDict()
    for key, value in state.items():
        for new, old in names.items():
            key = key.replace(new, old)
        if not key.endswith("embed_positions._float_tensor"):
            result[key] = value
    result["decoder.embed_positions.weights"] = torch.full((99, 16), 7.0)  # never used: it is computed
    return result


def test_both_containers(world: Any, by_hand: Any, plain: Any) -> None:
    path, state = plain
    check(world, world.save("zip.pt", by_hand.older(state), zipped=True), path)


@pytest.mark.parametrize("zipped", [False, True])
def test_nested_configuration(world: Any, by_hand: Any, plain: Any, zipped: bool) -> None:
    path, state = plain
    check(world, world.save("newer.pt", by_hand.newer(with_projection(state)), zipped), path)


def test_nested_configuration_that_keeps_namespaces(world: Any, by_hand: Any, plain: Any) -> None:
    path, state = plain
    content = by_hand.newer(with_projection(state))
    content["cfg"]["model"] = by_hand.namespace()
    content["cfg"]["task"] = argparse.Namespace(_name="language_modeling", data="/x", tokens_per_sample=32)
    check(world, world.save("between.pt", content, True), path)


@pytest.mark.parametrize("change", [fused, numbered_norms, lambda state: numbered_norms(fused(state))])
def test_names_of_older_parameters(world: Any, by_hand: Any, plain: Any, change: Any) -> None:
    path, state = plain
    changed = change(state)
    assert set(changed) != set(state)
    check(world, world.save("older.pt", by_hand.older(changed)), path)


@pytest.mark.parametrize("version", [None, [1.0], [2.0]])
def test_old_versions_have_no_final_norm(world: Any, by_hand: Any, version: list[float] | None) -> None:
    state = by_hand.plain_state(final_norm=False)
    wanted = world.save("wanted.pt", by_hand.older(state, no_decoder_final_norm=True))
    old = OrderedDict(state)
    del old["decoder.version"]
    if version is not None:
        old["decoder.version"] = torch.tensor(version)
    check(world, world.save("old.pt", by_hand.older(old)), wanted)


def test_shared_output_matrix(world: Any, by_hand: Any, plain: Any) -> None:
    """fairseq 0.9 stores nothing for it, 0.12 repeats the embeddings; both differ from a matrix of its own."""
    path, state = plain
    own = OrderedDict((key, value) for key, value in state.items() if key != "decoder.embed_out")
    shared = world.save("shared.pt", by_hand.older(own, share_decoder_input_output_embed=True))
    state = OrderedDict(with_projection(own))
    state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"].clone()
    check(world, world.save("n.pt", by_hand.newer(state, share_decoder_input_output_embed=True), True), shared)
    assert abs(world.loss(shared) - world.loss(path)) > 0.01


def test_learned_positions_and_narrow_embeddings(world: Any, by_hand: Any) -> None:
    """The shape of the WMT19 model (projections in and out), with learned positions on top."""
    state = by_hand.plain_state()
    generator = torch.Generator().manual_seed(9)
    for name, shape in {"embed_tokens.weight": (100, 8), "embed_out": (100, 8)}.items():
        state["decoder." + name] = torch.randn(shape, generator=generator)
    state["decoder.project_in_dim.weight"] = torch.randn(16, 8, generator=generator)
    state["decoder.project_out_dim.weight"] = torch.randn(8, 16, generator=generator)
    del state["decoder.embed_positions._float_tensor"]
    state["decoder.embed_positions.weight"] = torch.randn(32 + 2, 16, generator=generator)
    options = {"decoder_input_dim": 8, "decoder_output_dim": 8, "decoder_learned_pos": True}
    older = world.save("older.pt", by_hand.older(state, **options))
    check(world, world.save("newer.pt", by_hand.newer(with_projection(state), **options), True), older)


def test_adaptive_model_of_both_generations(world: Any, by_hand: Any) -> None:
    arch, state = "transformer_lm_wiki103", by_hand.adaptive_state()
    older = world.save("older.pt", by_hand.older(state, arch=arch, **by_hand.ADAPTIVE))
    assert world.loss(older) > 3
    separate = OrderedDict((key, value.clone()) for key, value in with_projection(state).items())  # ties by name alone
    check(world, world.save("newer.pt", by_hand.newer(separate, arch, **by_hand.ADAPTIVE), True), older)


@pytest.mark.parametrize("zipped", [False, True])
def test_half_precision_weights(world: Any, by_hand: Any, zipped: bool) -> None:
    """Stored in half precision, computed in single: the loss of the rounded weights, exactly."""
    state = by_hand.adaptive_state()
    half = OrderedDict((key, value.half() if value.is_floating_point() else value) for key, value in state.items())
    rounded = OrderedDict((key, value.float() if value.is_floating_point() else value) for key, value in half.items())
    options = {"arch": "transformer_lm_wiki103", **by_hand.ADAPTIVE}
    wanted = world.save("rounded.pt", by_hand.older(rounded, **options))
    check(world, world.save("half.pt", by_hand.older(half, **options), zipped), wanted)


def old_meters() -> tuple[Any, dict[str, Any]]:
    """A module like the fairseq.meters of 2018, and the meters that its checkpoints pickled."""
    module = types.ModuleType("fairseq.meters")
    for name in ("AverageMeter", "TimeMeter", "StopwatchMeter"):
        setattr(module, name, type(name, (), {"__module__": "fairseq.meters"}))
    meters: dict[str, Any] = OrderedDict()
    for number, name in enumerate(["AverageMeter", "TimeMeter", "StopwatchMeter"]):
        meter = getattr(module, name)()
        meter.__dict__.update(val=np.float32(1), avg=number, sum=1.0, count=2, start=0.5, n=3)
        meters[name] = meter
    return module, meters


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("numpy_core", ["numpy.core", "numpy._core"])
def test_pickled_meters_and_numpy_scalars(
    world: Any, by_hand: Any, plain: Any, zipped: bool, numpy_core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = plain
    content = by_hand.older(state)
    module, content["extra_state"]["train_meters"] = old_meters()
    content["extra_state"] |= {"val_loss": np.float64(4.5), "best": np.float32(4.25), "rates": np.arange(3)}

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        """Writes NumPy's module under the name of another version."""

        def save_global(self, obj: Any, name: Any = None) -> None:
            if getattr(obj, "__module__", "") in ("numpy._core.multiarray", "numpy.core.multiarray"):
                self.write(pickle.GLOBAL + f"{numpy_core}.multiarray\n{obj.__name__}\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

        dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]
        dispatch[types.BuiltinFunctionType] = save_global
        dispatch[types.FunctionType] = save_global

    writer = types.ModuleType("pickle_of_another_time")
    writer.Pickler = Pickler  # type: ignore[attr-defined]
    writer.dump = lambda obj, stream, protocol=2: Pickler(stream, protocol).dump(obj)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fairseq.meters", module)
        patch.setattr("fairseq.meters", module, raising=False)
        file = world.save("meters.pt", content, zipped, pickle_module=writer)
    raw = file.read_bytes()
    assert b"fairseq.meters" in raw
    assert f"{numpy_core}.multiarray".encode() in raw
    check(world, file, path)


def test_state_of_the_oldest_files_is_no_obstacle(world: Any, by_hand: Any, plain: Any) -> None:
    """No history, the optimiser beside the model, and options that have since gone."""
    path, state = plain
    args = by_hand.namespace(max_positions=32, raw_text=False, exclude_self_target=True)
    del args.tokens_per_sample, args.max_target_positions
    args.tokens_per_sample = 32
    content = {"args": args, "model": state, "optimizer": {"state": {}}, "epoch": 4, "batch_offset": 0, "val_loss": 3.0}
    check(world, world.save("oldest.pt", content), path)


def word_log_probs(log: str) -> np.ndarray:
    """What --output-word-probs logged, in natural logarithms."""
    found = re.findall(r"\S+ \[(-?[\d.]+)\]", log)
    return np.array(found, np.float64)


def test_ensemble(world: Any, by_hand: Any, plain: Any) -> None:
    """Probabilities of files joined by a colon are averaged, token by token; generations may be mixed."""
    first, _ = plain
    other = world.save("other.pt", by_hand.newer(with_projection(by_hand.plain_state(seed=5))), True)
    flags = ("--output-word-probs", "--sample-break-mode", "eos")
    single = [word_log_probs(world.evaluate(path, *flags)[1]) for path in (first, other)]
    figures, log = world.evaluate(f"{first}:{other}", *flags)
    together = word_log_probs(log)
    assert len(together) == figures["count"] > 100
    np.testing.assert_allclose(together, np.log((np.exp(single[0]) + np.exp(single[1])) / 2), atol=2e-6)
    assert figures["loss_base2"] == pytest.approx(-together.mean() / np.log(2), abs=1e-5)


def test_keys_need_no_override(world: Any, by_hand: Any, plain: Any) -> None:
    """--knn-keytype is enough; the original's --model-overrides on top change nothing."""
    path, _ = plain
    flags = ["--save-knnlm-dstore", "--dstore-mmap", world.folder / "store", "--knn-keytype", "last_ffn_input"]
    world.evaluate(path, *flags)
    keys = (world.folder / "store_keys.npy").read_bytes()
    world.evaluate(path, *flags, "--model-overrides", "{'knn_keytype': 'last_ffn_input'}")
    assert (world.folder / "store_keys.npy").read_bytes() == keys
    assert len(keys) % (16 * 4) == 0
