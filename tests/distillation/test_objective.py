"""What a distillation minimizes: losses against independent expressions, normalization, reductions, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.distillation import losses
from g2l_core.distillation.distributed import ProcessGroup
from g2l_core.distillation.losses import kl, kl_queue, logsum, logsum_corr, logsum_per_sample, rkd, standardize
from g2l_core.distillation.objective import Objective, TargetStatistics
from g2l_core.distillation.spec import LOSSES, ObjectiveSpec
from g2l_core.errors import UsageError


def gaussians(n=16, d=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def statistics(d=12):
    generator = torch.Generator().manual_seed(5)
    mean, deviation = torch.randn(d, generator=generator), 0.5 + torch.rand(d, generator=generator)
    return TargetStatistics(mean=mean, deviation=deviation, bank=torch.randn(40, d, generator=generator))


# ---- losses ---------------------------------------------------------------------------------------------------


def test_form_b_is_the_sum_over_dimensions_of_half_their_squared_errors():
    """1 - c_d = mean_n (s - t)^2 / 2 exactly where both sides are standardized (distributed as in the paper)."""
    student, teacher = (standardize(z, eps=1e-12) for z in gaussians(64, 20))
    halves = 0.5 * (student - teacher).double().square().mean(dim=0)
    assert float(logsum_corr(student, teacher)) == pytest.approx(math.log(float((halves**4).sum()) + 1e-5), rel=1e-5)


def test_per_sample_is_the_mean_of_each_patch_s_log():
    student, teacher = gaussians()
    by_hand = [float(logsum(student[i : i + 1], teacher[i : i + 1])) for i in range(16)]
    assert float(logsum_per_sample(student, teacher)) == pytest.approx(np.mean(by_hand))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_scipy_s_entropy(temperature):
    from scipy.special import softmax
    from scipy.stats import entropy

    student, teacher = gaussians()
    p, q = (softmax(z.double().numpy() / temperature, axis=1) for z in (teacher, student))
    wanted = temperature**2 * np.mean(entropy(p, q, axis=1))
    assert float(kl(student, teacher, temperature=temperature)) == pytest.approx(wanted, rel=1e-5)


def test_kl_queue_is_the_divergence_of_similarities_to_the_bank():
    from scipy.special import softmax
    from scipy.stats import entropy
    from sklearn.metrics.pairwise import cosine_similarity

    student, teacher = gaussians()
    bank = statistics().bank
    p, q = (softmax(cosine_similarity(z, bank) / 0.1, axis=1) for z in (teacher, student))
    found = float(kl_queue(student, teacher, bank=bank, temperature=0.1))
    assert found == pytest.approx(np.mean(entropy(p, q, axis=1)), rel=1e-4)
    assert float(kl_queue(3 * teacher, teacher, bank=bank)) == pytest.approx(0, abs=1e-6)


def test_rkd_by_loops():
    """Park et al. 2019: distances over their mean, cosines of the angles of all triples, Huber losses 1 : 2."""
    student, teacher = (z.double().numpy() for z in gaussians(6, 4))

    def distances(z):
        found = np.array([np.linalg.norm(z[i] - z[j]) for i in range(6) for j in range(i + 1, 6)])
        return found / found.mean()

    def angles(z):
        found = []
        for i in range(6):
            for j in range(6):
                for k in range(6):
                    if len({i, j, k}) == 3:
                        a, b = z[j] - z[i], z[k] - z[i]
                        found.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        return np.array(found)

    def huber(a, b):
        d = np.abs(a - b)
        return np.where(d < 1, d**2 / 2, d - 0.5).mean()

    wanted = huber(distances(student), distances(teacher)) + 2 * huber(angles(student), angles(teacher))
    assert float(rkd(*map(torch.from_numpy, (student, teacher)))) == pytest.approx(wanted, rel=1e-5)


@given(seed=st.integers(0, 100), scale=st.floats(0.1, 10))
def test_rkd_ignores_rotation_shift_and_scale(seed, scale):
    student, teacher = gaussians(8, 5, seed)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(5, 5)))
    moved = scale * student @ torch.from_numpy(turn.astype(np.float32)) + 3
    assert float(rkd(moved, teacher)) == pytest.approx(float(rkd(student, teacher)), rel=1e-3)


# ---- normalization ----------------------------------------------------------------------------------------------


def test_a_perfect_student_has_no_loss_but_in_the_forbidden_mixture():
    """Batch statistics on both sides cancel; against the dataset's the batch's noise remains, 0.047 at 32 rows."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4096, 64, generator=generator)
    batches = teacher.view(128, 32, 64)
    both = [float((standardize(b) - standardize(b)).square().mean()) for b in batches]
    mixed = np.mean([float((standardize(b) - b).square().mean()) for b in batches])
    assert max(both) == 0
    assert mixed == pytest.approx(0.047, abs=0.006)
    with pytest.raises(UsageError, match="on one side only .*a perfect student would still have a loss"):
        ObjectiveSpec(teacher_norm="dataset", student_norm="batch")
    with pytest.raises(UsageError, match="on one side only .teacher batch, student none"):
        ObjectiveSpec(student_norm="none")


def test_norms_follow_the_teacher():
    assert ObjectiveSpec().norms == ("batch", "batch")
    assert ObjectiveSpec(teacher_norm="dataset").norms == ("none", "dataset")
    assert ObjectiveSpec(teacher_norm="none").norms == ("none", "none")
    assert ObjectiveSpec(loss="kl_queue").norms == ("none", "dataset")


@pytest.mark.parametrize("loss", ["logsum", "mse", "cosine", "smooth_l1", "kl", "rkd"])
def test_dataset_statistics_standardize_the_targets_alone(loss):
    student, teacher = gaussians()
    known = statistics()
    objective = Objective(ObjectiveSpec(loss=loss, teacher_norm="dataset"), known)
    plain = Objective(ObjectiveSpec(loss=loss, teacher_norm="none"))
    assert float(objective(student, teacher)) == pytest.approx(
        float(plain(student, (teacher - known.mean) / known.deviation)), rel=1e-5
    )


def test_the_settings_name_every_loss():
    assert tuple(losses.LOSSES) == LOSSES


def test_the_default_is_the_papers():
    student, teacher = gaussians()
    assert float(Objective(ObjectiveSpec())(student, teacher)) == float(
        logsum(standardize(student), standardize(teacher), alpha=4.0)
    )


@pytest.mark.parametrize("loss", ["logsum", "logsum_corr"])
def test_the_comparable_figure_does_not_grow_with_batch_or_width(loss):
    spec = ObjectiveSpec(loss=loss)
    figures = []
    for n, d in ((64, 256), (256, 256), (256, 1024)):
        value = float(Objective(spec)(*gaussians(n, d)))
        figures.append(spec.comparable(value, n, d))
    assert max(figures) - min(figures) < 0.1
    assert ObjectiveSpec(loss="mse").comparable(1.5, 32, 8) == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "logsumm"}, "unknown loss 'logsumm'. Did you mean logsum"),
        ({"alpha": 0.0}, "finite alpha above 0"),
        ({"temperature": 2.0}, "a temperature is for kl, kl_queue"),
        ({"loss": "kl", "temperature": 0.0}, "must be above 0"),
        ({"teacher_norm": "batches"}, "unknown teacher-norm 'batches'. Did you mean batch"),
        ({"reduce": "globl"}, "unknown reduce 'globl'. Did you mean global"),
        ({"batch_statistics": "world"}, "unknown batch-statistics 'world'"),
        ({"loss": "mse", "reduce": "per-sample"}, "per-sample is a form of the logsum loss; mse has none"),
        ({"loss": "logsum_corr", "teacher_norm": "none"}, "needs teacher-norm batch"),
        ({"loss": "kl_queue", "teacher_norm": "batch"}, "use teacher-norm dataset or none"),
    ],
)
def test_objectives_that_mean_nothing(options, message):
    with pytest.raises(UsageError, match=message):
        ObjectiveSpec(**options)


def test_statistics_must_be_there():
    with pytest.raises(UsageError, match="needs the targets' statistics"):
        Objective(ObjectiveSpec(teacher_norm="dataset"))


def test_the_bank_is_scaled_as_the_targets_are():
    student, teacher = gaussians()
    known = statistics()
    scaled = Objective(ObjectiveSpec(loss="kl_queue"), known)(student, teacher)
    by_hand = kl_queue(
        student, (teacher - known.mean) / known.deviation, bank=(known.bank - known.mean) / known.deviation
    )
    assert float(scaled) == pytest.approx(float(by_hand), rel=1e-5)


# ---- ranks ------------------------------------------------------------------------------------------------------


def test_one_rank_gathers_itself():
    z = torch.randn(4, 3)
    assert ProcessGroup().gather(z) is z
    assert torch.equal(ProcessGroup(rank=1, world=2).local(torch.cat([z, 2 * z])), 2 * z)
