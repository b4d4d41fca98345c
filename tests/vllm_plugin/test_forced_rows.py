"""The processor of forced decoding alone: which row of the logits is which step of which request."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from diffkv.vllm_plugin.worker.forced import Forced

VOCABULARY, STEPS = 11, 3


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "log_probs.npy"
    array = np.lib.format.open_memmap(path, "w+", np.float32, (2, STEPS, VOCABULARY))
    array[:] = np.nan
    array.flush()
    return path


def _params(file, row, tokens):
    asked = {"file": str(file), "row": row, "tokens": tokens}
    return SamplingParams(extra_args={"forced": asked})


def _update(size, removed=(), added=(), moved=()):
    return BatchUpdate(batch_size=size, removed=removed, added=added, moved=moved)


def test_first_runner_follows_requests_through_the_batch(file):
    processor = Forced(None, "cpu", False)
    other: list[int] = []
    outputs: list[list[int]] = [[], []]
    added = [
        (0, SamplingParams(), [1], other),
        (1, _params(file, 0, [7, 8, 9]), [1], outputs[0]),
        (2, _params(file, 1, []), [1], outputs[1]),
    ]
    processor.update_state(_update(3, added=added))
    logits = torch.randn(3, VOCABULARY)
    before = logits.clone()

    result = processor.apply(logits)

    assert result[1].argmax() == 7 and result[1, :7].max() == -torch.inf
    assert torch.equal(result[[0, 2]], before[[0, 2]])
    outputs[0].append(7)
    outputs[1].append(int(before[2].argmax()))

    # the request that is not ours ends, and the last one takes its place
    processor.update_state(
        _update(2, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    )
    later = torch.randn(2, VOCABULARY)
    expected = later.log_softmax(-1).numpy()
    assert processor.apply(later.clone())[1].argmax() == 8

    written = np.load(file)
    np.testing.assert_allclose(written[:, 0], before[1:].log_softmax(-1).numpy(), atol=1e-6)
    np.testing.assert_allclose(written[0, 1], expected[1], atol=1e-6)
    np.testing.assert_allclose(written[1, 1], expected[0], atol=1e-6)
    assert np.isnan(written[:, 2]).all()


def test_steps_beyond_the_file_are_left_alone(file):
    processor = Forced(None, "cpu", False)
    processor.update_state(_update(1, added=[(0, _params(file, 0, [1, 2, 3]), [1], [1, 2, 3])]))
    logits = torch.randn(1, VOCABULARY)
    assert torch.equal(processor.apply(logits.clone()), logits)
    assert np.isnan(np.load(file)).all()


def test_second_runner_counts_steps_by_position(file):
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([0, 0, 40, 0, 0, 50])))
    processor = Forced(None, states)
    assert processor.add_request(2, _params(file, 0, [3, 4, 5]))
    assert processor.add_request(5, _params(file, 1, [6, 7, 8]))
    assert not processor.add_request(0, SamplingParams())

    def apply(slots, positions):
        logits = torch.randn(len(slots), VOCABULARY)
        context = SimpleNamespace(
            expanded_idx_mapping=torch.tensor(slots), pos=torch.tensor(positions)
        )
        return logits.log_softmax(-1).numpy(), processor.apply(logits, context)

    # slot 2: its prompt's last token, then one of its answer; slot 5: a chunk of a prompt
    first, result = apply([5, 0, 2], [30, 12, 39])
    assert result[2].argmax() == 3 and torch.isfinite(result[:2]).all()
    second, result = apply([2, 5], [40, 49])
    assert result.argmax(-1).tolist() == [4, 6]

    written = np.load(file)
    np.testing.assert_allclose(written[0, 0], first[2], atol=1e-6)
    np.testing.assert_allclose(written[0, 1], second[0], atol=1e-6)
    np.testing.assert_allclose(written[1, 0], second[1], atol=1e-6)
    assert np.isnan(written[0, 2]).all() and np.isnan(written[1, 1:]).all()

    processor.add_request(2, SamplingParams())  # the slot has another request
    _, result = apply([2], [41])
    assert torch.isfinite(result).all()
