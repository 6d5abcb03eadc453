"""Every divergence and geometry by its option: the right one is built, its gradient norms are right, it is logged."""

from __future__ import annotations

import pytest
import torch

from plot_align import transport
from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.transport.reward import DistributionReward
from plot_align.trl import attach
from plot_align.trl.gradients import gradient_norms

TERMS = [
    ({}, transport.Wasserstein1),
    ({"geometry": "principal"}, transport.Wasserstein1),
    ({"geometry": "vocabulary"}, transport.Wasserstein1),
    ({"geometry": "sliced", "slices": 5}, transport.SlicedWasserstein),
    ({"geometry": "max_sliced", "slices": 5}, transport.MaxSlicedWasserstein),
    ({"divergence": "sinkhorn"}, transport.SinkhornTopK),
    ({"divergence": "sinkhorn", "sinkhorn_support": "clusters", "sinkhorn_size": 20}, transport.SinkhornClusters),
    ({"divergence": "emo"}, transport.ExpectedCost),
    ({"divergence": "tv"}, transport.TotalVariation),
    ({"divergence": "js"}, transport.JensenShannon),
    ({"divergence": "kl", "target": "softmax"}, transport.KullbackLeibler),
    ({"divergence": "deft_log"}, DistributionReward),
    ({"divergence": "deft_prob"}, DistributionReward),
]


def first_head_pass(trainer, handle, monkeypatch):
    """The losses of the first micro-batch and what its head pass left, still with their graph."""
    found = {}
    measure = handle._measure

    def keep(vanilla, loss, result):
        found.update(vanilla=vanilla, loss=loss, result=result)
        return measure(vanilla, loss, result)

    monkeypatch.setattr(handle, "_measure", keep)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, dict(inputs))
    return found["vanilla"], found["loss"], found["result"]


@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
@pytest.mark.parametrize(("options", "cls"), TERMS)
def test_every_term(make_trainer, preference, monkeypatch, options, cls, granularity):
    """The norms of the rows result again, all of them here, are those of autograd through the whole head."""
    monkeypatch.setattr("plot_align.trl.gradients._SAMPLED_ROWS", 10_000)
    trainer = make_trainer("dpo")
    handle = attach(trainer, preference, PlotConfig.paper(alpha=2.0, granularity=granularity, **options))
    assert type(handle.term.divergence) is cls
    vanilla, loss, result = first_head_pass(trainer, handle, monkeypatch)
    assert loss.item() != 0
    found = gradient_norms(vanilla, loss, result)
    result.recompute_rows = None
    torch.testing.assert_close(found, gradient_norms(vanilla, loss, result), rtol=1e-4, atol=1e-9)
    assert ("plot/sinkhorn_error" in trainer._metrics["train"]) == issubclass(cls, transport.Sinkhorn)


def test_directions_are_seeded(make_trainer, preference):
    lines = []
    for seed in (0, 0, 1):
        handle = attach(
            make_trainer("dpo"), preference, PlotConfig.from_options(geometry="sliced", slices=3, geometry_seed=seed)
        )
        lines.append(torch.cat([buffer.double().flatten() for buffer in handle.term.divergence.buffers()]))
    assert torch.equal(lines[0], lines[1])
    assert not torch.equal(lines[0], lines[2])


def test_the_log_reading_refuses_a_soft_cap(make_trainer, preference):
    trainer = make_trainer("dpo")
    trainer.model.config.final_logit_softcapping = 30.0
    with pytest.raises(InputError, match="final_logit_softcapping is 30"):
        attach(trainer, preference, PlotConfig.from_options(divergence="deft_log"))
    attach(trainer, preference, PlotConfig.from_options(divergence="deft_prob"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slices": 0}, "slices is 0; expected 1 or more"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations is 0; expected 1 or more"),
        ({"sinkhorn_size": 0}, "sinkhorn_size is 0; expected 1 or more, or none"),
        ({"sinkhorn_epsilon": 0.0}, "sinkhorn_epsilon is 0.0; expected a positive number"),
        ({"divergence": "deft_log", "pool": True}, "pool is on with divergence='deft_log'"),
        ({"alpha_schedule": "linear"}, "alpha is missing with alpha_schedule='linear'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        PlotConfig.from_options(**options)
