"""The reference judged by the source documents' numbers and formulas, and by mpmath."""

from typing import Any

import mpmath
import numpy as np
import pytest

from softmax_ext import reference
from tests.truth.exact import (
    NAN,
    OPTIONS,
    TOKEN,
    WEIGHT,
    close,
    exact,
    loud,
    plain_loss,
    plain_rows,
    slopes,
    soft_targets,
)

pytestmark = pytest.mark.filterwarnings("error")  # no NumPy warning may escape


Z = [1.1, 2.2, 0.2, -1.7]  # document 4


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(80):
        yield


def test_worked_example_of_document_4():
    s = reference.softmax(Z)
    assert s.round(3)[:3].tolist() == [0.224, 0.672, 0.091]
    assert int(s[3] * 1000) == 13  # printed 0.013: cut, not rounded
    assert np.argsort(s).tolist() == np.argsort(Z).tolist() == [3, 2, 0, 1]
    assert abs(s.sum() - 1) < 3e-16


def test_jacobian_cell_by_cell_document_1():
    s1, s2, s3 = s = reference.softmax([0.3, -1.2, 0.9])
    cells = [
        [s1 * (1 - s1), -s1 * s2, -s1 * s3],
        [-s2 * s1, s2 * (1 - s2), -s2 * s3],
        [-s3 * s1, -s3 * s2, s3 * (1 - s3)],
    ]
    close(reference.softmax_jacobian(s), cells, 1e-15)


def test_jacobian_is_the_derivative_document_4():
    x = exact(Z)
    s = reference.softmax(Z)
    j = reference.softmax_jacobian(s)
    for i in range(4):

        def output(z, i=i):
            return mpmath.exp(z[i]) / mpmath.fsum(mpmath.exp(v) for v in z)

        close(j[i], slopes(output, x), 4e-15)  # a is rounded before the Jacobian sees it
    assert (np.diag(j) > 0).all()
    assert (j[~np.eye(4, dtype=bool)] < 0).all()
    assert np.abs(j.sum(1)).max() < 1e-16  # the reader's unweighted A + B + C


def test_matrix_form_is_kronecker_form():
    a = reference.softmax(Z)
    e = np.ones(4)
    matrix = np.outer(a, e) * (np.eye(4) - np.outer(e, a))  # document 3
    kronecker = [[a[i] * ((i == j) - a[j]) for j in range(4)] for i in range(4)]  # document 2 (5)
    close(reference.softmax_jacobian(a), matrix, 1e-15)
    np.testing.assert_array_equal(matrix, kronecker)


def test_gradient_of_document_4():
    s, y = reference.softmax(Z), np.array([0.0, 0.0, 1.0, 0.0])
    assert abs(float(reference.cross_entropy([Z], y[None])) + np.log(s[2])) < 1e-15
    close(reference.cross_entropy_grad([Z], y[None])[0], s - y, 1e-15)
    close(reference.cross_entropy_grad([Z], [2])[0], s - y, 1e-15)
    y = np.array([0.5, 2.0, 0.0, 0.25])  # sums to 2.75: the step before the last
    close(reference.cross_entropy_grad([Z], y[None])[0], s * y.sum() - y, 2e-15)
    assert np.abs(s * y.sum() - y - (s - y)).max() > 0.1


def test_softmax_and_log_softmax_are_right_to_the_last_digits():
    x, _ = loud()
    for i, row in enumerate(exact(x)):
        e = [mpmath.exp(v) for v in row]
        close(reference.softmax(x)[i], [v / mpmath.fsum(e) for v in e])
        close(reference.log_softmax(x)[i], [mpmath.log(v / mpmath.fsum(e)) for v in e])
    assert abs(reference.softmax(x)[0, 2] - 0.5) < 1e-15
    assert -1e-20 < reference.log_softmax(x)[1, 0] < 0  # not 0


def test_products_with_the_jacobian():
    rng = np.random.default_rng(3)
    x, _ = loud()
    a, d = reference.softmax(x), rng.standard_normal((6, 7))
    for i in range(6):
        j = reference.softmax_jacobian(a[i])
        np.testing.assert_allclose(reference.softmax_vjp(a, d)[i], d[i] @ j, atol=1e-15)
        np.testing.assert_allclose(reference.softmax_jvp(a, d)[i], j @ d[i], atol=1e-15)

    def weighted(z):
        return np.array(
            [
                mpmath.fsum(up * row) - mpmath.fsum(up) * mpmath.log(mpmath.fsum(map(mpmath.exp, row)))
                for row, up in zip(z, exact(d), strict=True)
            ]
        )

    close(reference.log_softmax_vjp(x, d), slopes(weighted, exact(x)))
    assert np.abs(reference.log_softmax_vjp(x, d)).max() > 0.5


@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_axis(axis):
    x = np.random.default_rng(0).standard_normal((3, 4, 5))
    d = np.random.default_rng(1).standard_normal((3, 4, 5))
    a = reference.softmax(x, axis=axis)
    np.testing.assert_allclose(a, np.exp(x) / np.exp(x).sum(axis, keepdims=True), rtol=1e-14)
    np.testing.assert_allclose(np.exp(reference.log_softmax(x, axis=axis)), a, rtol=1e-14)
    dx = a * (d - (a * d).sum(axis, keepdims=True))
    np.testing.assert_allclose(reference.softmax_vjp(a, d, axis=axis), dx, atol=1e-15)
    dx = d - a * d.sum(axis, keepdims=True)
    np.testing.assert_allclose(reference.log_softmax_vjp(x, d, axis=axis), dx, atol=2e-15)


def test_odd_sizes():
    assert float(reference.softmax(3.0)) == 1.0
    assert reference.softmax(np.zeros((2, 0))).shape == (2, 0)
    assert reference.log_softmax(np.zeros((0, 3))).shape == (0, 3)
    np.testing.assert_array_equal(reference.log_softmax([[5.0]]), [[0.0]])
    assert float(reference.cross_entropy([[5.0]], [0])) == 0.0
    np.testing.assert_array_equal(reference.cross_entropy_grad([[5.0]], [0]), [[0.0]])
    assert float(reference.cross_entropy(Z, 1)) == -reference.log_softmax(Z)[1]  # 1-d input
    assert reference.cross_entropy_grad(Z, 1).shape == (4,)


@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy_and_gradient(name, soft):
    options = OPTIONS[name]
    x, target = loud()
    if soft:
        target = soft_targets()
        options = {k: v for k, v in options.items() if k != "ignore_index"}
    close(reference.cross_entropy(x, target, **options), plain_loss(exact(x), target, **options))
    truth = slopes(lambda z: plain_rows(z, target, **options), exact(x))
    grad = reference.cross_entropy_grad(x, target, **options)
    if name in ("scale", "everything"):  # 0.7 * 1e4 itself rounds
        close(grad, truth, 4e-15)
    else:
        close(grad, truth)
    seen = [0, 1, 4]  # the cap flattens row 3, options ignore rows 2 and 5
    assert np.abs(grad[seen]).max(1).min() > 0
    assert np.abs(grad).max() > 0.05


def test_confident_row_keeps_loss_and_gradient():
    x, target = loud()
    loss = reference.cross_entropy(x, target, reduction="none")
    grad = reference.cross_entropy_grad(x, target, reduction="none")
    assert 0 < loss[1] < 1e-23
    assert -1e-23 < grad[1, 0] < 0
    assert grad[1, 0] == pytest.approx(-grad[1, 1:].sum(), rel=1e-14)
    close(grad, slopes(lambda z: plain_rows(z, target, reduction="sum"), exact(x)))
    onehot = reference.cross_entropy_grad(x, np.eye(7)[target], reduction="none")
    np.testing.assert_array_equal(onehot, grad)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.5, "ignore_index": 5}])
def test_each_row_has_its_own_upstream_gradient(options):
    x, target = loud()
    d = np.array([1.0, -2.0, 0.5, 3.0, 0.0, 1.5])
    options = {**options, "reduction": "none", "weight": WEIGHT}
    grad = reference.cross_entropy_grad(x, target, dloss=d, **options)
    truth = slopes(lambda z: exact(d) * plain_rows(z, target, **options), exact(x))
    close(grad, truth)
    assert (grad[4] == 0).all()
    assert (grad[0] != 0).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.5, "ignore_index": 5}])
@pytest.mark.parametrize("stat", ["lse", "logprob", "entropy"])
def test_stats(stat, options):
    x, target = loud()
    noise: dict[str, Any] = {
        "weight": WEIGHT,
        "token_weight": TOKEN,
        "label_smoothing": 0.5,
    }  # must not matter
    _, stats = reference.cross_entropy(x, target, stats=(stat,), **noise, **options)
    assert list(stats) == [stat]
    close(stats[stat], plain_rows(exact(x), target, stat=stat, **options))
    d = np.array([1.0, -2.0, 0.5, 3.0, 0.25, 1.5])
    grad = reference.cross_entropy_grad(x, target, dloss=0.0, dstats={stat: d}, **noise, **options)
    truth = slopes(lambda z: exact(d) * plain_rows(z, target, stat=stat, **options), exact(x))
    close(grad, truth, 4e-15)
    assert np.abs(grad).max(1)[:1] > 0.05


def test_stats_argmax_and_ignored_rows():
    x = np.array([[1.0, 3.0, 3.0], [0.0, -1.0, 7.0], [30.0, 60.0, 0.0]])
    names = ("argmax", "entropy", "lse", "logprob")
    _, stats = reference.cross_entropy(x, [0, -100, 1], stats=names, softcap=None)
    assert tuple(stats) == names
    assert stats["argmax"].tolist() == [1, -1, 1]
    assert [stats[n][1] for n in names[1:]] == [0, 0, 0]
    _, stats = reference.cross_entropy(x, np.ones((3, 3)), stats=("argmax",), softcap=0.01)
    assert stats["argmax"].tolist() == [0, 2, 0]  # of the capped logits, where more of them tie


def saboteurs(right):
    wrong = np.array(right)
    yield "zeros", np.zeros_like(wrong)
    yield "sign", -wrong
    yield "rows shifted", np.roll(wrong, 1, 0)
    yield "last column", np.where(np.arange(7) == 6, 0, wrong)
    one = wrong.copy()
    one[5, 5] = NAN
    yield "one NaN", one
    yield "all NaN", np.full_like(wrong, NAN)
    yield "float32", wrong.astype(np.float32).astype(np.float64)
    one = wrong.copy()
    one[1, 0] = 0.0
    yield "confident target", one


def test_the_check_rejects_wrong_gradients():
    x, target = loud()
    y = soft_targets()
    truth = slopes(lambda z: plain_rows(z, target), exact(x))
    right = reference.cross_entropy_grad(x, target)
    close(right, truth)
    p = reference.softmax(x) / 6
    cases = [*saboteurs(right), ("no one-hot", p), ("no sum", -np.eye(7)[target] / 6)]
    cases += [("1 - p", p - np.eye(7)[target] / 6)]
    for name, wrong in cases:
        with pytest.raises(AssertionError):  # noqa: PT012
            close(wrong, truth)
            print(f"{name} went through")
    with pytest.raises(AssertionError):  # sum(y) taken to be 1
        close(p - y / 6, slopes(lambda z: plain_rows(z, y), exact(x)))
