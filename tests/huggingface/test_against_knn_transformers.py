"""Every setting that knn-transformers was run with, token by token, from its own files: log-probabilities, searches and
the number of candidates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq import options
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.knnlm import build_knnlm
from fairseq.retrieval.index import faiss_index
from fairseq.retrieval.similarity import Similarity
from tests.huggingface.conftest import GOLDEN_HF

EXPECTED = json.loads((GOLDEN_HF / "expected.json").read_text())
SETTINGS = [(model, name) for model in ("gpt2", "llama") for name in EXPECTED[model]["settings"]]
# The peer's answers that are accidents; docs/footguns.md says which and why.
LEAKING = {"reto_clusters_min1_batch4", "reto_noclusters_min1_batch4"}  # rows of a batch see each other's pointers
LEAST_SIMILAR = {"knnlm_exact_dot", "reto_clusters_min1_exact_dot", "reto_clusters_min1_dot"}  # a dot product, negated
# With searches and pointers in one step, an entry found both ways has two distances that differ in their last bits,
# which decide what the cut to --max-knns leaves; the bits depend on the instructions that the processor has.
LAST_BITS = {"reto_clusters_min100_max128+stablesort"}
BASE = "--gen-subset valid --drop-remainder --group-documents 1000 --max-sentences 4 --no-progress-bar --cpu"


class Peer:
    """The peer's flags as ours, and the language model's part of each layout, computed once."""

    def __init__(self, binarised: Any, folder: Path) -> None:
        self.binarised, self.folder, self.scored = binarised, folder, {}

    def flags(self, model: str, name: str) -> list[str]:
        argv, given = EXPECTED[model]["settings"][name]["argv"], {}
        for word, following in zip(argv, [*argv[1:], "--"]):
            if word.startswith("--"):
                given[word[2:]] = True if following.startswith("--") else following
        flags = [str(self.binarised(GOLDEN_HF / model)), "--path", str(GOLDEN_HF / model), *BASE.split()]
        flags += ["--max-length", given["block_size"], "--stride", given["stride"]]
        if "dstore_dir" not in given:
            return flags
        exact = given.get("recompute_dists") == "True"
        flags += ["--knnlm", "--dstore-dir", str(self.files(model, given)), "--lmbda", given.get("lmbda", "0.25")]
        flags += ["--k", given["k"], "--probe", given["probe"], "--knn-temp", given.get("knn_temp", "1.0")]
        flags += ["--knn-keytype", given.get("knn_keytype", "last_ffn_input"), "--tie-order", "stable"]
        flags += [] if exact else ["--knn-sim-func", "do_not_recomp_l2", "--no-load-keys"]
        if "knn" in given or "no_pointer" in given:
            return [*flags, "--no-pointer"]
        flags += ["--min-knns", given.get("min_knns", "1"), "--max-knns", given.get("max_knns", "1024")]
        return [*flags, *(["--members", str(GOLDEN_HF / given["members"])] if "members" in given else [])]

    def files(self, model: str, given: dict[str, Any]) -> Path:
        """The peer's folder, completed by what the fixture leaves out for size."""
        source = GOLDEN_HF / given["dstore_dir"]
        folder = self.folder / given["dstore_dir"].replace("/", "-")
        if folder.exists():
            return folder
        shutil.copytree(source, folder)
        stem = f"dstore_{model}_{given['dstore_size']}_32"
        if model == "llama":  # its keys: what we store for its text
            save = self.flags(model, "base") + ["--save-knnlm-dstore", "--dstore-fp16"]
            save[save.index("valid")] = "train"
            args = options.parse_args_and_arch(options.get_eval_lm_parser(), save)
            scoring = LMScoring(args)
            keys = [keys for batch in scoring.batches() for _, _, keys in scoring.keys(batch)]
            torch.cat(keys).half().numpy().tofile(folder / f"{stem}_keys.npy")
        elif not (folder / f"{stem}_vals.npy").exists():  # those of the other type of key
            shutil.copy(GOLDEN_HF / "gpt2" / "dstore" / f"{stem}_vals.npy", folder)
        return folder

    def run(
        self, model: str, name: str, similarity: Similarity | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Log-probabilities, searches, candidates, each (T,). similarity: used in place of the flags'."""
        args = options.parse_args_and_arch(options.get_eval_lm_parser(), self.flags(model, name))
        key = (model, args.stride, args.knn_keytype)
        if key not in self.scored:
            scoring = LMScoring(args)
            batches = [scoring.score(batch) for batch in scoring.batches()]
            self.scored[key] = (scoring.key_dimension if args.knnlm else 0, sum(batches, []))
        width, sequences = self.scored[key]
        if not args.knnlm:
            return torch.cat([sequence.lm_log_probs for sequence in sequences]).numpy(), None, None
        knnlm = build_knnlm(args, width)
        knnlm.similarity = similarity or knnlm.similarity
        results = knnlm.score(sequences)
        log_probs = torch.cat([result.log_probs for result in results]).numpy()
        searched = np.concatenate([result.searched for result in results])
        return log_probs, searched, np.concatenate([result.candidates for result in results])


class LeastSimilar:
    """The peer's `dot`: an inner product in the place of a distance, so the larger it is the less an entry counts.
    vectors (N, D): those of the entries; recomputed: also for what a search found, which else has its L2 distance."""

    rebuilds = False

    def __init__(self, vectors: torch.Tensor, recomputed: bool) -> None:
        self.vectors, self.recomputed = vectors, recomputed

    def of_search(self, queries: torch.Tensor, distances: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return -(queries[:, None] * self.vectors[ids]).sum(-1) if self.recomputed else -distances

    def of_entries(self, queries: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return -(queries[rows] * self.vectors[ids]).sum(-1)

    of_rebuilt = of_entries


@pytest.fixture(scope="module")
def peer(binarised: Any, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return Peer(binarised, tmp_path_factory.mktemp("peer"))


@pytest.fixture(scope="module")
def arrays() -> Any:
    return np.load(GOLDEN_HF / "expected.npz")


@pytest.mark.parametrize("model, name", [pair for pair in SETTINGS if pair[1] not in LEAKING | LEAST_SIMILAR])
def test_setting(peer: Peer, arrays: Any, model: str, name: str) -> None:
    log_probs, searched, candidates = peer.run(model, name)
    theirs = arrays[f"{model}/{name}/lp"]
    difference = np.abs(log_probs - theirs)
    assert difference.max() < (2e-3 if name in LAST_BITS else 1e-3)
    assert np.median(difference) < 1e-5
    loss = EXPECTED[model]["settings"][name]["token_weighted_loss"]
    assert -log_probs.mean(dtype=np.float64) == pytest.approx(loss, abs=1e-4)
    if searched is not None:
        np.testing.assert_array_equal(searched, arrays[f"{model}/{name}/searched"].astype(bool))
        np.testing.assert_array_equal(candidates, arrays[f"{model}/{name}/n_cand"])


@pytest.mark.parametrize("model, name", [pair for pair in SETTINGS if pair[1] in LAST_BITS])
def test_only_last_bits_differ(
    peer: Peer, arrays: Any, monkeypatch: pytest.MonkeyPatch, model: str, name: str
) -> None:
    """Tokens that stay the same when the last bits of the distances of followed entries change agree as in all other
    settings; few are not of that kind."""
    exact, random = faiss_index.pairwise, torch.Generator().manual_seed(1)

    def other_bits(*args: Any) -> torch.Tensor:
        distances = exact(*args)
        return distances * (1 + 2.0**-23 * torch.randint(-4, 5, distances.shape, generator=random))

    log_probs = peer.run(model, name)[0]
    monkeypatch.setattr(faiss_index, "pairwise", other_bits)
    others = np.stack([peer.run(model, name)[0] for _ in range(6)])
    settled = np.abs(others - log_probs).max(0) < 1e-5
    assert (~settled).sum() <= 15
    assert np.abs(log_probs - arrays[f"{model}/{name}/lp"])[settled].max() < 1e-4


@pytest.mark.parametrize("model, name", [pair for pair in SETTINGS if pair[1] in LEAST_SIMILAR])
def test_the_peers_dot_is_negated(peer: Peer, arrays: Any, model: str, name: str) -> None:
    """With the sign that the peer gives it, and with L2 distances beside it where the peer mixes them, its numbers come
    out; so its sign is all that our `--knn-sim-func dot` does not follow."""
    (file,) = (GOLDEN_HF / model / "dstore").glob("index_*")
    if recomputed := "exact" in name:
        keys = np.fromfile(next((GOLDEN_HF / model / "dstore").glob("*_keys.npy")), np.float16).reshape(-1, 32)
        vectors = torch.from_numpy(keys.astype(np.float32))
    else:
        index = faiss.read_index(str(file))
        index.make_direct_map()
        vectors = torch.from_numpy(index.reconstruct_n(0, index.ntotal))
    log_probs, searched, candidates = peer.run(model, name, LeastSimilar(vectors, recomputed))
    difference = np.abs(log_probs - arrays[f"{model}/{name}/lp"])
    assert difference.max() < 1e-3 and np.median(difference) < 1e-5
    np.testing.assert_array_equal(searched, arrays[f"{model}/{name}/searched"].astype(bool))
    np.testing.assert_array_equal(candidates, arrays[f"{model}/{name}/n_cand"])


@pytest.mark.parametrize("model, name", [pair for pair in SETTINGS if pair[1] in LEAKING])
def test_rows_of_a_batch_do_not_see_each_other(peer: Peer, arrays: Any, model: str, name: str) -> None:
    """With batches of 4 ours is the peer's answer for batches of 1, where its state cannot leak."""
    alone = name.removesuffix("_batch4")
    log_probs, searched, _ = peer.run(model, name)
    assert np.abs(log_probs - arrays[f"{model}/{alone}/lp"]).max() < 1e-3
    assert np.array_equal(searched, arrays[f"{model}/{alone}/searched"].astype(bool))
    assert np.abs(log_probs - arrays[f"{model}/{name}/lp"]).max() > 0.1  # the peer's own is another


def test_the_stored_keys_are_the_peers(binarised: Any, run_cli: Any, tmp_path: Path, golden_hf: Path) -> None:
    store = golden_hf / "gpt2/dstore/dstore_gpt2_17662_32"
    flags = f"--gen-subset train --max-length 128 --stride 64 {BASE[19:]} --save-knnlm-dstore --dstore-fp16".split()
    where = [binarised(golden_hf / "gpt2"), "--path", golden_hf / "gpt2", "--dstore-mmap", tmp_path / "d"]
    done = run_cli("eval_lm", [*where, *flags])
    assert done.status == 0, done.stderr
    values = np.fromfile(tmp_path / "d_vals.npy", np.int32)
    np.testing.assert_array_equal(values, np.fromfile(f"{store}_vals.npy", np.int32))
    keys, theirs = (np.fromfile(f"{path}_keys.npy", np.float16).astype(np.float32) for path in (tmp_path / "d", store))
    np.testing.assert_allclose(keys, theirs, atol=4e-3)
    described = json.loads((tmp_path / "d.json").read_text())
    assert (described["rows"], described["dimension"]) == (17662, 32)
