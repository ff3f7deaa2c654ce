"""Weight sharing: k-means finds few good values, and what shares a value goes on sharing it while it is trained."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import nn

import workbench as wb
from workbench.compression import step_from_dict
from workbench.compression._kmeans import kmeans_1d
from workbench.compression._sharing import KeepShared
from workbench.errors import StepError
from workbench.study.recipe import Recipe

RNG = np.random.default_rng(0)
SAMPLES = {
    "normal": RNG.normal(size=3000),
    "heavy tails": RNG.standard_t(2, size=3000),
    "two lobes": np.sign(RNG.normal(size=3000)) * (1 + RNG.exponential(size=3000)),
    "an outlier": np.r_[RNG.normal(size=2000), 1000.0],
    "few values, often": RNG.integers(0, 40, 3000).astype(float),
}


def blobs(count: int = 64) -> wb.Task:
    """Points around one centre per class."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    x = (np.eye(3, 6)[labels] * 3 + rng.normal(size=(count, 6))).astype(np.float32)
    return wb.Task.from_arrays(x, labels, x, labels, calibration=8)


def mlp(*, zeros: float = 0.0) -> wb.Model:
    """Two linear layers around a normalisation; a share of the weights pruned to zero."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        for layer in (module[0], module[3]):
            smallest = layer.weight.abs().flatten().argsort()[: round(zeros * layer.weight.numel())]
            layer.weight.flatten()[smallest] = 0
    model = wb.load(module, inputs=torch.zeros(2, 6))
    return model.changed("pruned", module=module) if zeros else model


def weights(model: wb.Model) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy() for k, v in model.module.state_dict().items() if v.ndim == 2}


# k-means


def inertia(values: np.ndarray, centroids: np.ndarray) -> float:
    return float((np.abs(values[:, None] - centroids.astype(float)).min(1) ** 2).sum())


@pytest.mark.parametrize("clusters", [2, 3, 16, 64])
@pytest.mark.parametrize("sample", SAMPLES)
def test_the_sum_of_squares_is_at_most_a_little_above_that_of_scikit_learn(sample, clusters):
    values = SAMPLES[sample].astype(np.float32).astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs = KMeans(clusters, n_init=2, random_state=0).fit(values[:, None]).inertia_
    centroids, _ = kmeans_1d(values, clusters)
    assert inertia(values, centroids) <= 1.03 * theirs + 1e-9


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_value_has_its_nearest_centroid_and_every_centroid_is_the_mean_of_its_values(sample):
    values = SAMPLES[sample].astype(np.float32)
    centroids, indices = kmeans_1d(values, 8)
    assert centroids.dtype == np.float32 and len(centroids) == 8 and (np.diff(centroids) > 0).all()
    nearest = np.abs(values[:, None].astype(float) - centroids).argmin(1)
    np.testing.assert_array_equal(indices, nearest)
    means = [values[indices == i].astype(float).mean() for i in range(8)]
    np.testing.assert_allclose(centroids, means, rtol=1e-5)


def test_no_more_values_than_clusters_are_kept_as_they_are():
    values = np.array([[0.3, -2.0], [0.1, 0.3]], np.float32)
    centroids, indices = kmeans_1d(values, 16)
    np.testing.assert_array_equal(centroids, np.float32([-2.0, 0.1, 0.3]))
    np.testing.assert_array_equal(centroids[indices], values)
    assert kmeans_1d(np.float32([0.7]), 1)[0].tolist() == [np.float32(0.7)]


def test_one_cluster_is_the_mean_and_order_does_not_matter():
    values = SAMPLES["normal"].astype(np.float32)
    assert kmeans_1d(values, 1)[0][0] == pytest.approx(values.astype(float).mean())
    np.testing.assert_array_equal(kmeans_1d(values, 16)[0], kmeans_1d(values[::-1], 16)[0])


def test_thousands_of_clusters_find_that_many_values():
    values = np.random.default_rng(1).normal(size=20_000).astype(np.float32)
    centroids, indices = kmeans_1d(values, 4096)
    assert len(centroids) == 4096 and indices.dtype == np.uint16
    assert np.abs(centroids[indices] - values).max() < 0.1


# the step


def test_a_layer_takes_the_means_of_its_own_clusters():
    module = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 2.0, 10.0, 12.0]]))
        module[1].weight.copy_(torch.tensor([[-1.0], [0.0], [-3.0], [5.0]]))
    model = wb.load(module, inputs=torch.zeros(2, 4))
    shared = wb.Cluster(2).apply(model, blobs())
    assert weights(shared)["0.weight"].tolist() == [[1.5, 1.5, 11.0, 11.0]]
    assert weights(shared)["1.weight"].ravel().tolist() == [-2.0, 0.0, -2.0, 5.0]
    together = wb.Cluster(2, scope="global").apply(model, blobs())
    # 1, 2, -1, -3 and 5 against 10 and 12
    assert weights(together)["0.weight"].tolist() == [[pytest.approx(0.8), pytest.approx(0.8), 11.0, 11.0]]
    assert weights(together)["1.weight"].ravel().tolist() == pytest.approx([0.8, 0.0, 0.8, 0.8])


def test_zeros_stay_zero_biases_stay_and_the_given_model_is_left_alone():
    model = mlp(zeros=0.5)
    before, fingerprint = weights(model), model.fingerprint
    shared = wb.Cluster(4).apply(model, blobs())
    for name, after in weights(shared).items():
        np.testing.assert_array_equal(after == 0, before[name] == 0)
        assert len(np.unique(after[after != 0])) == 4
    assert torch.equal(shared.module[0].bias, model.module[0].bias)
    assert wb.Model(model.name, model.example, module=model.module).fingerprint == fingerprint
    assert shared.changes == ("pruned", "clustered")


def test_layers_take_their_own_number_of_values_and_zero_leaves_one_as_it_is():
    model = mlp()
    shared = weights(wb.Cluster(16, layers={"0": 3}).apply(model, blobs()))
    assert [len(np.unique(w)) for w in shared.values()] == [3, 16]
    left = weights(wb.Cluster(4, layers={"3": 0}).apply(model, blobs()))
    np.testing.assert_array_equal(left["3.weight"], weights(model)["3.weight"])
    assert len(np.unique(left["0.weight"])) == 4


def test_global_values_are_one_set_for_all_layers():
    shared = weights(wb.Cluster(5, scope="global").apply(mlp(zeros=0.3), blobs()))
    together = np.concatenate([w.ravel() for w in shared.values()])
    assert len(np.unique(together[together != 0])) == 5


def test_the_record_tells_values_noise_and_entropy_of_each_layer():
    model = mlp(zeros=0.5)
    shared = wb.Cluster(4).apply(model, blobs())
    record = shared.records[-1]
    assert record.step == "Share 4 values" and [row["layer"] for row in record.rows] == ["0", "3"]
    for row, name in zip(record.rows, weights(model), strict=True):
        before, after = weights(model)[name].astype(float), weights(shared)[name].astype(float)
        share = np.unique(after, return_counts=True)[1] / after.size
        assert (row["clusters"], row["weights"], row["nonzero"]) == (4, before.size, before.size // 2)
        assert row["sqnr_db"] == pytest.approx(10 * np.log10((before**2).sum() / ((before - after) ** 2).sum()))
        assert row["entropy_bits_per_weight"] == pytest.approx(-(share * np.log2(share)).sum())
    again = wb.Cluster(4).apply(shared, blobs())
    assert [row["sqnr_db"] for row in again.records[-1].rows] == [None, None]
    assert again.fingerprint == shared.fingerprint


def test_a_weight_that_two_layers_have_in_common_is_shared_once_and_stays_common():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    module[1].weight = module[0].weight
    shared = wb.Cluster(4).apply(wb.load(module, inputs=torch.zeros(2, 8)), blobs())
    assert shared.module[0].weight is shared.module[1].weight
    assert [row["layer"] for row in shared.records[-1].rows] == ["0"]


def test_finetuning_moves_shared_values_together_and_keeps_zeros():
    model, task = mlp(zeros=0.5), blobs()
    plain = wb.Cluster(3).apply(model, task)
    tuned = wb.Cluster(3, epochs=2, learning_rate=0.01, validation=0.0).apply(model, task, seed=1)
    for name, before in weights(plain).items():
        after = weights(tuned)[name]
        assert not np.array_equal(before, after)
        for value in np.unique(before):
            moved = np.unique(after[before == value])
            assert len(moved) == 1 and (moved[0] == 0) == (value == 0)
    assert [record.title for record in tuned.records] == ["shared values, by layer", "training, by epoch"]
    losses = [row["loss"] for row in tuned.records[-1].rows]
    assert losses[1] < losses[0]
    same = wb.Cluster(3, epochs=2, learning_rate=0.01, validation=0.0).apply(model, task, seed=1)
    assert same.fingerprint == tuned.fingerprint


def test_a_later_finetuning_keeps_shared_values():
    shared = wb.Cluster(3).apply(mlp(), blobs())
    tuned = wb.Finetune(epochs=1).apply(shared, blobs())
    for name, after in weights(tuned).items():
        assert len(np.unique(after)) == 3 and not np.array_equal(after, weights(shared)[name])


# the constraint


class Explicit(nn.Module):
    """Two layers without biases whose weights are read from centroids; index -1 stands for zero."""

    def __init__(self, centroids: torch.Tensor, indices: list[torch.Tensor]):
        super().__init__()
        self.centroids, self.indices = nn.Parameter(centroids.clone()), indices

    def matrices(self) -> list[torch.Tensor]:
        padded = torch.cat([self.centroids, torch.zeros(1)])
        return [padded[index] for index in self.indices]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.matrices()
        return torch.relu(x @ first.T) @ second.T


@pytest.mark.parametrize("common", [False, True], ids=["values by layer", "values of all layers"])
@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.SGD(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.01),
    ],
    ids=["sgd", "nesterov", "adamw"],
)
def test_training_shared_weights_is_training_the_centroids(optimiser, common):
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(4 if common else 8, generator=generator)
    indices = [torch.randint(-1, 4, shape, generator=generator) for shape in ((12, 6), (3, 12))]
    if not common:
        indices[1] = torch.where(indices[1] >= 0, indices[1] + 4, -1)
    explicit = Explicit(centroids, indices)
    tied = nn.Sequential(nn.Linear(6, 12, bias=False), nn.ReLU(), nn.Linear(12, 3, bias=False))
    with torch.no_grad():
        for layer, matrix in zip((tied[0], tied[2]), explicit.matrices(), strict=True):
            layer.weight.copy_(matrix)
    keep = KeepShared(tied)
    sides = (explicit, optimiser(explicit.parameters())), (tied, optimiser(tied.parameters()))
    for _ in range(6):
        x, y = torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        for module, update in sides:
            update.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            if module is tied:
                keep.after_gradients()
            update.step()
        with torch.no_grad():
            keep.after_update()
    assert not torch.allclose(explicit.centroids, centroids, atol=1e-3)
    for layer, matrix, index in zip((tied[0], tied[2]), explicit.matrices(), indices, strict=True):
        torch.testing.assert_close(layer.weight, matrix, atol=1e-5, rtol=1e-4)
        assert (layer.weight[index < 0] == 0).all()
    assert len(torch.cat([tied[0].weight.flatten(), tied[2].weight.flatten()]).unique()) == len(centroids) + 1


def test_layers_that_share_no_value_and_frozen_ones_are_left_alone():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 4, bias=False))
    with torch.no_grad():
        module[1].weight.fill_(0.5)
    module[1].weight.requires_grad_(False)
    keep = KeepShared(module)
    module(torch.randn(3, 64)).sum().backward()
    before = module[0].weight.grad.clone()
    keep.after_gradients()
    assert torch.equal(module[0].weight.grad, before) and module[1].weight.grad is None


# settings, recipes, stores


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"clusters": 1}, "clusters is 1"),
        ({"clusters": 2.5}, "whole number"),
        ({"clusters": 65537}, "at most 65536"),
        ({"scope": "network"}, "Accepted: global, layer"),
        ({"epochs": -1}, "epochs is -1"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"layers": {"fc1": 1}}, "clusters of fc1 is 1"),
        ({"layers": {"fc1": 8}, "scope": "global"}, "exclude each other"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(StepError, match=said):
        wb.Cluster(**settings)


def test_unknown_layers_wrong_models_and_empty_work_are_refused_before_any_work(digits):
    lenet = wb.load("lenet5")
    with pytest.raises(StepError, match="Did you mean 'fc3'"):
        wb.Cluster(layers={"fc": 4}).check(lenet)
    with pytest.raises(StepError, match="nothing is shared"):
        wb.Cluster(layers={"0": 0, "3": 0}).check(mlp())
    with pytest.raises(StepError, match="already int8"):
        wb.Cluster().check(wb.Quantize("int8").preview(lenet))
    with pytest.raises(StepError, match="ONNX graph"):
        wb.Cluster().check(wb.Model("graph", lenet.example, graph=lenet.onnx()))


def test_labels_and_every_way_of_writing_it_down_agree():
    step = wb.Cluster(32, epochs=2, layers={"conv1": 256, "fc3": 0})
    assert wb.Cluster().label == "Share 16 values"
    assert step.label == "Share 32 values, 2 layers otherwise, 2 epochs"
    assert wb.Cluster(scope="global").label == "Share 16 values, global"
    assert step_from_dict(step.to_dict()) == step and hash(step_from_dict(step.to_dict())) == hash(step)
    assert eval(step.to_python(), {"wb": wb}) == step
    recipe = Recipe((step,), wb.OnnxRuntime())
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_study_opened_again_has_the_same_weights_and_records(tmp_path):
    model, task = mlp(zeros=0.5), blobs()
    steps = [wb.Cluster(3, epochs=1)]
    with wb.Study(model, task, store=tmp_path) as study:
        made = study.run(steps, on=wb.Eager()).model()
    with wb.Study(model, task, store=tmp_path) as study:
        again = study.candidates[0].model()
    assert again is not made and again.fingerprint == made.fingerprint
    assert again.records == made.records and again.changes == made.changes
