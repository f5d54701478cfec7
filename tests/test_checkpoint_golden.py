"""The genuine checkpoint of the golden bundle: read strictly, it gives the original system's queries and scores."""

import numpy as np
import pytest
import torch

from fairseq import checkpoint_utils
from fairseq.data import LMContextWindowDataset, MonolingualDataset, TokenBlockDataset, data_utils

PAD = 1
OVERRIDES = {"knn_keytype": "last_ffn_input"}


@pytest.fixture(scope="module")
def loaded(golden):
    overrides = {**OVERRIDES, "data": str(golden / "data-bin")}
    path = str(golden / "checkpoints" / "checkpoint_best.pt")
    return checkpoint_utils.load_model_ensemble_and_task([path], overrides)


@pytest.fixture(scope="module")
def expected(golden):
    return np.load(golden / "expected.npz")


def test_configuration_and_ties(loaded):
    (model,), args, task = loaded
    assert (args.arch, args.decoder_embed_dim, args.max_target_positions) == ("transformer_lm_wiki103", 32, 128)
    assert len(task.dictionary) == 1504
    decoder = model.decoder
    assert decoder.adaptive_softmax.tail[0][2].weight is decoder.embed_tokens.embeddings[1][0].weight
    assert decoder.layer_norm is None
    assert sum(p.numel() for p in model.parameters()) == 34_104


def test_training_state_is_kept(golden):
    state = checkpoint_utils.load_checkpoint_to_cpu(golden / "checkpoints" / "checkpoint_best.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 600
    assert state["extra_state"]["train_iterator"]["epoch"] == 18
    assert state["extra_state"]["best"] == 4.83
    assert {"state", "param_groups"} <= state["last_optimizer_state"].keys()


def test_state_is_written_under_the_names_it_was_read_from(loaded, golden):
    (model,), _, _ = loaded
    original = checkpoint_utils.read_torch_file(golden / "checkpoints" / "checkpoint_best.pt")["model"]
    written = model.state_dict()
    assert list(written) == list(original)
    ignored = "_float_tensor"  # content irrelevant
    assert all(torch.equal(written[key], original[key]) for key in original if not key.endswith(ignored))
    assert all(written[key].dtype == original[key].dtype for key in original)


def test_queries_and_scores_are_the_originals(loaded, expected, golden):
    (model,), _, task = loaded
    model.eval()
    dictionary = task.dictionary
    lines = data_utils.load_indexed_dataset(str(golden / "data-bin" / "valid"), dictionary)
    blocks = TokenBlockDataset(
        lines, lines.sizes, 32, pad=PAD, eos=dictionary.eos(), break_mode="complete", include_targets=True
    )
    samples = MonolingualDataset(
        blocks,
        blocks.sizes,
        dictionary,
        dictionary,
        add_eos_for_other_targets=True,
        shuffle=False,
        targets=["future"],
    )
    windows = LMContextWindowDataset(samples, 32, 96, PAD)
    scores, queries, tokens = [], [], []
    with torch.inference_mode():
        for first in range(0, len(windows), 2):
            batch = windows.collater([windows[i] for i in range(first, min(first + 2, len(windows)))])
            output = model(**batch["net_input"])
            real = batch["target"].ne(PAD)
            scores.append(model.get_target_log_probs(output, batch["target"], PAD)[real])
            queries.append(output[1]["last_ffn_input"].transpose(0, 1)[real])
            tokens.append(batch["target"][real])
    assert np.array_equal(torch.cat(tokens).numpy(), expected["tokens"])
    np.testing.assert_allclose(torch.cat(scores).numpy(), expected["a_base/positional_scores"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(torch.cat(queries).numpy()[:512], expected["queries_first512"], atol=1e-4, rtol=0)
