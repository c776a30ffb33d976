"""The reference judged by the source documents' numbers, by 80-digit arithmetic, and by torch."""

from typing import Any

import mpmath
import numpy as np
import pytest

from softmax_ext import reference

pytestmark = pytest.mark.filterwarnings("error")  # no NumPy warning may escape

H = mpmath.mpf(10) ** -25  # step of the central differences, taken with 80 digits
WIDE = float(np.finfo(np.longdouble).eps)
RTOL = 1e-15 if WIDE < 1e-18 else 1e-11  # an offset of 1e4 costs digits where long double is double
Z = [1.1, 2.2, 0.2, -1.7]  # document 4
NAN, INF = np.nan, np.inf


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(80):
        yield


def close(ours, truth, rtol=RTOL):
    """Each entry relative to itself; its row may add 16 long-double steps of the row's peak."""
    ours = np.asarray(ours)
    with np.errstate(all="ignore"):
        truth = np.asarray(truth).astype(np.float64)
    assert ours.dtype == np.float64
    assert ours.shape == truth.shape
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(truth))
    infinite = np.isinf(ours) | np.isinf(truth)
    np.testing.assert_array_equal(ours[infinite], truth[infinite])
    finite = np.isfinite(truth)
    a, b = np.where(finite, ours, 0), np.where(finite, truth, 0)
    peak = np.max(np.abs(b), -1, keepdims=True, initial=0) if b.ndim else np.abs(b)
    excess = np.abs(a - b) - (rtol * np.abs(b) + 16 * WIDE * peak)
    assert excess.size == 0 or excess.max() <= 0, f"off by {np.abs(a - b).max()}"


def exact(x):
    """The same numbers with 80 digits."""
    return np.vectorize(mpmath.mpf, otypes=[object])(np.asarray(x, np.float64))


def plain_rows(
    x,
    target,
    weight=None,
    *,
    token_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    stat=None,
):
    """The definition, row by row with no care for rounding; "mean" is divided here, summed later.

    With `stat`, that statistic of each row instead.
    """
    rows, classes = x.shape
    w = exact(np.ones(classes) if weight is None else weight)
    tw = exact(np.ones(rows) if token_weight is None else token_weight)
    s = mpmath.mpf(label_smoothing)
    soft = np.asarray(target).dtype.kind == "f"
    losses, stats, den = [], [], mpmath.mpf(0)
    for i in range(rows):
        if not soft and target[i] == ignore_index:
            losses.append(mpmath.mpf(0))
            stats.append(mpmath.mpf(0))
            continue
        z = [mpmath.mpf(logit_scale) * v for v in x[i]]
        if softcap is not None:
            z = [v if v == -mpmath.inf else softcap * mpmath.tanh(v / softcap) for v in z]
        total = mpmath.fsum(mpmath.exp(v) for v in z)
        p = [mpmath.exp(v) / total for v in z]
        y = exact(target[i]) if soft else exact(np.arange(classes) == target[i])
        mass = w * ((1 - s) * y + s / classes)
        if not soft:
            mass = w[target[i]] * (1 - s) * y + w * s / classes
        ce = -mpmath.fsum(m * mpmath.log(q) for m, q in zip(mass, p, strict=True) if m)
        losses.append(tw[i] * (ce + mpmath.mpf(z_loss) * mpmath.log(total) ** 2))
        den += tw[i] * (1 if soft else w[target[i]])
        stats.append(
            {
                None: 0,
                "lse": mpmath.log(total),
                "logprob": None if soft else mpmath.log(p[target[i]]),
                "entropy": -mpmath.fsum(q * mpmath.log(q) for q in p if q),
            }[stat]
        )
    if stat:
        return np.array(stats, object)
    losses = np.array(losses, object)
    return losses / (den if reduction == "mean" else 1)


def plain_loss(x, target, weight=None, *, reduction="mean", **options):
    rows = plain_rows(x, target, weight, reduction=reduction, **options)
    return rows if reduction == "none" else np.sum(rows)


def slopes(f, x):
    """Central differences along the last axis, all rows at once: f must treat each row alone."""
    grad = np.empty(x.shape, object)
    for j in range(x.shape[-1]):
        up, down = x.copy(), x.copy()
        up[..., j], down[..., j] = x[..., j] + H, x[..., j] - H
        grad[..., j] = (f(up) - f(down)) / (2 * H)
    return grad


def loud(seed=0):
    """Six rows of 7: a peak of p = 1/2, confident right and wrong, offset 1e4, tie, plain."""
    rng = np.random.default_rng(seed)
    x = 2 * rng.standard_normal((6, 7))
    target = np.array([2, 0, 3, 6, 1, 5])
    x[0, 2] = np.log(np.exp(np.delete(x[0], 2)).sum())
    x[1, 0], x[2, 4] = 60.0, 60.0
    x[3] += 1e4
    x[4, [1, 5]] = 3.0
    return x, target


def soft_targets(seed=1):
    y = np.random.default_rng(seed).exponential(size=(6, 7))
    y[0, 1] = 0.0
    y[1] = np.eye(7)[0]
    y[2] *= 3 / y[2].sum()  # sums to 3
    return y


WEIGHT = np.array([0.5, 2.0, 1.5, 0.25, 3.0, 1.0, 0.75])
TOKEN = np.array([1.0, 0.5, 2.0, 0.25, 1.5, 3.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "weight": {"weight": WEIGHT},
    "token_weight": {"token_weight": TOKEN},
    "both_weights": {"weight": WEIGHT, "token_weight": TOKEN},
    "ignore": {"ignore_index": 3},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing_1": {"label_smoothing": 1.0, "weight": WEIGHT},
    "smoothing_weight": {"label_smoothing": 0.3, "weight": WEIGHT, "reduction": "sum"},
    "scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 5.0},
    "z_loss": {"z_loss": 0.125},
    "everything": {
        "weight": WEIGHT,
        "token_weight": TOKEN,
        "ignore_index": 5,
        "label_smoothing": 0.2,
        "logit_scale": 0.7,
        "softcap": 4.0,
        "z_loss": 0.01,
    },
}


# --- the documents' own numbers ------------------------------------------------------------------


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


# --- softmax and log_softmax ---------------------------------------------------------------------


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


# --- cross_entropy against 80 digits -------------------------------------------------------------


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


# --- data facts ----------------------------------------------------------------------------------


def test_minus_infinity_without_mass():
    x, target = loud()
    x[0, 3] = x[1, 5] = x[4, 0] = -INF
    everything: dict[str, Any] = {"softcap": 5.0, "logit_scale": 0.5, "z_loss": 0.1}
    for options in ({}, everything):
        for t in (target, np.eye(7)[target]):
            close(reference.cross_entropy(x, t, **options), plain_loss(exact(x), t, **options))
            grad = reference.cross_entropy_grad(x, t, dstats={"entropy": np.ones(6), "lse": np.ones(6)}, **options)
            assert np.isfinite(grad).all()
            assert (grad[np.isneginf(x)] == 0).all()
    assert reference.softmax(x)[0, 3] == 0
    assert reference.log_softmax(x)[0, 3] == -INF
    d = np.ones((6, 7))
    assert reference.log_softmax_vjp(x, d)[0, 3] == 1.0
    assert reference.softmax_vjp(reference.softmax(x), d)[0, 3] == 0.0


def test_minus_infinity_with_mass():
    x = np.array([[1.0, -INF, 2.0], [0.0, 1.0, 2.0]])
    p = reference.softmax(x)
    loss = reference.cross_entropy(x, [1, 1], reduction="none")
    assert loss[0] == INF
    assert np.isfinite(loss[1])
    close(reference.cross_entropy_grad(x, [1, 1], reduction="sum"), p - np.eye(3)[[1, 1]], 1e-15)
    for s in (0.1, 1.0):
        for t in ([0, 0], np.eye(3)[[0, 0]]):
            loss = reference.cross_entropy(x, t, reduction="none", label_smoothing=s)
            assert loss[0] == INF
            grad = reference.cross_entropy_grad(x, t, reduction="sum", label_smoothing=s)
            close(grad[0], p[0] - (1 - s) * np.eye(3)[0] - s / 3, 2e-15)
    masked = np.array([1.0, 0.0, 1.0])  # no class weight, so no smoothing mass
    loss = reference.cross_entropy(x, [0, 0], masked, reduction="none", label_smoothing=0.1)
    assert np.isfinite(loss).all()


@pytest.mark.parametrize("bad", [[-INF] * 3, [INF, 0.0, 1.0], [NAN, 0.0, 1.0], [INF, NAN, -INF]])
def test_a_bad_row_is_nan_and_alone(bad):
    x = np.array([[1.0, 2.0, 0.5], bad, [0.0, -1.0, 3.0]])
    good = [0, 2]
    for out in (reference.softmax(x), reference.log_softmax(x)):
        assert np.isnan(out[1]).all()
        assert np.isfinite(out[good]).all()
    for t in (np.array([0, 1, 2]), np.eye(3)):
        loss, stats = reference.cross_entropy(x, t, reduction="none", stats=("lse", "entropy"))
        grad = reference.cross_entropy_grad(x, t)
        for out in (loss, grad, stats["lse"], stats["entropy"]):
            assert np.isnan(out[1]).all()
        np.testing.assert_array_equal(loss[good], reference.cross_entropy(x[good], t[good], reduction="none"))
        alone = reference.cross_entropy_grad(x[good], t[good], dloss=2 / 3)
        np.testing.assert_allclose(grad[good], alone, rtol=1e-15)


@pytest.mark.parametrize("bad", [-INF, INF, NAN])
def test_a_bad_row_of_one_class(bad):
    loss, stats = reference.cross_entropy([[bad]], [0], stats=("lse", "entropy"))
    assert np.isnan([loss, stats["lse"][0], stats["entropy"][0]]).all()
    assert np.isnan(reference.softmax([bad])).all()
    assert np.isnan(reference.cross_entropy_grad([[bad]], [0])).all()


def test_plus_infinity_is_finite_under_a_soft_cap():
    x = np.array([[INF, 0.0, -INF]])
    loss = reference.cross_entropy(x, [0], softcap=2.0)
    assert float(loss) == pytest.approx(np.log1p(np.exp(-2.0)), rel=1e-15)
    grad = reference.cross_entropy_grad(x, [0], softcap=2.0)
    assert grad[0, 0] == grad[0, 2] == 0  # flat
    assert grad[0, 1] == pytest.approx(1 / (1 + np.exp(2.0)), rel=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_reach_nothing(reduction):
    x, target = loud()
    options = {**OPTIONS["everything"], "reduction": reduction, "ignore_index": -100}
    tw = options.pop("token_weight")
    kept = [0, 2, 3, 5]
    target[[1, 4]] = -100
    x[1], x[4] = NAN, INF
    holes = tw.copy()
    holes[[1, 4]] = NAN
    loss = reference.cross_entropy(x, target, token_weight=holes, **options)
    alone = reference.cross_entropy(x[kept], target[kept], token_weight=tw[kept], **options)
    np.testing.assert_allclose(loss if loss.ndim == 0 else loss[kept], alone, rtol=1e-15)
    grad = reference.cross_entropy_grad(x, target, token_weight=holes, **options)
    alone = reference.cross_entropy_grad(x[kept], target[kept], token_weight=tw[kept], **options)
    np.testing.assert_allclose(grad[kept], alone, rtol=1e-15)
    np.testing.assert_array_equal(grad[[1, 4]], np.zeros((2, 7)))
    if reduction == "none":
        np.testing.assert_array_equal(loss[[1, 4]], [0, 0])


PLAIN_SMOOTH_WEIGHT: list[dict[str, Any]] = [{}, {"label_smoothing": 1.0}, {"weight": WEIGHT}]


def test_out_of_range_targets_are_nan_rows():
    x, target = loud()
    for value in (-1, 7, 2**40, -(2**63)):
        t = target.copy()
        t[1] = value
        for options in PLAIN_SMOOTH_WEIGHT:
            loss, stats = reference.cross_entropy(x, t, reduction="none", stats=("logprob", "lse", "argmax"), **options)
            np.testing.assert_array_equal(np.isnan(loss), np.arange(6) == 1)
            np.testing.assert_array_equal(np.isnan(stats["logprob"]), np.arange(6) == 1)
            assert np.isfinite(stats["lse"]).all()
            assert stats["argmax"][1] == 0
            grad = reference.cross_entropy_grad(x, t, **options)
            assert np.isnan(grad[1]).all()
            stand_in = np.where(np.arange(6) == 1, 0, target)  # in the denominator: class 0
            right = reference.cross_entropy_grad(x, stand_in, **options)
            np.testing.assert_array_equal(np.delete(grad, 1, 0), np.delete(right, 1, 0))


def test_target_types():
    x, target = loud()
    right = reference.cross_entropy(x, target)
    for kind in ("u1", "i1", "u2", "i4", "u4", "u8"):
        assert reference.cross_entropy(x, target.astype(kind)) == right
    for value in (np.uint8(156), np.uint64(2**64 - 100)):  # both are -100 if the type wraps
        t = target.astype(value.dtype)
        t[2] = value
        assert np.isnan(reference.cross_entropy(x, t, reduction="none")[2])
    t = target.astype(np.uint8)
    t[2] = 200
    grad = reference.cross_entropy_grad(x, t, ignore_index=200)
    assert (grad[2] == 0).all()
    t = np.where(target == 3, -100, target)
    assert reference.cross_entropy(x, t, ignore_index=None) == reference.cross_entropy(x, t)


def test_empty_and_all_ignored():
    empty = np.zeros((0, 7)), np.zeros(0, int)
    ignored = np.full((2, 7), NAN), np.full(2, -100)
    for x, t in (empty, ignored):
        assert float(reference.cross_entropy(x, t, reduction="sum")) == 0.0
        assert reference.cross_entropy(x, t, reduction="none").tolist() == [0.0] * len(t)
        assert np.isnan(reference.cross_entropy(x, t))
        assert float(reference.cross_entropy(x, t, on_all_ignored="zero")) == 0.0
        for rule in ("nan", "zero"):
            grad = reference.cross_entropy_grad(x, t, on_all_ignored=rule)
            np.testing.assert_array_equal(grad, np.zeros(x.shape))
    y = np.zeros((0, 7))
    assert np.isnan(reference.cross_entropy(y, y))
    assert float(reference.cross_entropy(y, y, on_all_ignored="zero")) == 0.0


def test_weights_summing_to_zero():
    x, target = loud()
    tw = np.array([1.0, -1.0, 2.0, -2.0, 0.0, 0.0])
    cases: list[dict[str, Any]] = [{"token_weight": tw}, {"token_weight": 0 * tw}]
    for options in [*cases, {"weight": np.zeros(7)}]:
        assert not np.isfinite(reference.cross_entropy(x, target, **options))
        assert not np.isfinite(reference.cross_entropy_grad(x, target, **options)).all()
        options = {**options, "on_all_ignored": "zero"}
        assert float(reference.cross_entropy(x, target, **options)) == 0.0
        grad = reference.cross_entropy_grad(x, target, **options)
        np.testing.assert_array_equal(grad, np.zeros((6, 7)))


# --- the linear head -----------------------------------------------------------------------------


def head(seed=0):
    rng = np.random.default_rng(seed)
    x, w, b = (2 * rng.standard_normal(s) for s in ((4, 3), (5, 3), (5,)))
    return x, w, b, np.array([1, -100, 4, 0])


@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
def test_linear_gradients(soft):
    x, w, b, target = head()
    options: dict[str, Any] = {
        "weight": WEIGHT[:5],
        "token_weight": TOKEN[:4],
        "label_smoothing": 0.1,
    }
    options |= {"softcap": 6.0, "logit_scale": 0.5, "z_loss": 0.01}
    keep = [0, 1, 2, 3] if soft else [0, 2, 3]
    if soft:
        target = soft_targets()[:4, :5]
    clean = x.copy()
    if not soft:
        x[1] = NAN

    def loss(x, w, b):
        return plain_loss(x @ w.T + b, target, **options)

    args: list[Any] = [exact(clean), exact(w), exact(b)]
    ours = reference.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    close(ours, loss(*args))
    grads = reference.linear_cross_entropy_grad(x, w, target, linear_bias=b, **options)
    for i, grad in enumerate(grads):
        assert grad is not None

        def at(flat, i=i):
            moved: list[Any] = [*args[:i], flat.reshape(args[i].shape), *args[i + 1 :]]
            return loss(*moved)

        truth = slopes(at, args[i].ravel()).reshape(grad.shape).astype(np.float64)
        np.testing.assert_allclose(grad, truth, rtol=1e-14, atol=1e-17)
        assert np.abs(grad).max() > 0.02
    assert (grads[0][keep] != 0).all()
    assert soft or (grads[0][1] == 0).all()
    assert reference.linear_cross_entropy_grad(x, w, target)[2] is None


def test_linear_ignored_row_is_exactly_zero_and_a_bad_target_is_nan():
    x, w, _, target = head()
    w[3] = NAN  # every kept row is NaN, the ignored one still reaches nothing
    dx, dw, _ = reference.linear_cross_entropy_grad(x, w, target)
    assert (dx[1] == 0).all()
    assert np.isnan(dx[[0, 2, 3]]).all()
    x, w, b, target = head()
    target[2] = 5
    dx, dw, db = reference.linear_cross_entropy_grad(x, w, target, linear_bias=b)
    assert np.isnan(dx[2]).all()
    assert np.isfinite(dx[[0, 1, 3]]).all()
    assert np.isnan(dw).all()
    assert db is not None
    assert np.isnan(db).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
def test_linear_shift(soft, reduction):
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((2, 6, 3)), rng.standard_normal((5, 3))
    target = rng.exponential(size=(2, 6, 5)) if soft else rng.integers(0, 5, (2, 6))
    tw = rng.exponential(size=(2, 6))
    for k in (1, 2, 6, 8):
        n = max(6 - k, 0)
        dloss = rng.standard_normal((2, n)) if reduction == "none" else 1.5
        same: dict[str, Any] = {"reduction": reduction, "stats": ("lse",), "on_all_ignored": "zero"}
        ours, stats = reference.linear_cross_entropy(x, w, target, token_weight=tw, shift=k, **same)
        cut = x[:, :n], w, target[:, 6 - n :]
        truth, lse = reference.linear_cross_entropy(*cut, token_weight=tw[:, 6 - n :], **same)
        np.testing.assert_array_equal(ours, truth)
        np.testing.assert_array_equal(stats["lse"], lse["lse"])
        same["dloss"] = dloss
        dx, dw, _ = reference.linear_cross_entropy_grad(x, w, target, token_weight=tw, shift=k, **same)
        cut_dx, cut_dw, _ = reference.linear_cross_entropy_grad(*cut, token_weight=tw[:, 6 - n :], **same)
        np.testing.assert_array_equal(dx[:, :n], cut_dx)
        assert (dx[:, n:] == 0).all()
        np.testing.assert_array_equal(dw, cut_dw)


# --- torch's own answers, where it has one -------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["integer", "ignored", "soft"])
def test_torch_agrees(kind, weighted, smoothing, reduction):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    x = 3 * rng.standard_normal((4, 7, 2, 3))  # classes on axis 1
    w = WEIGHT if weighted else None
    target = rng.integers(0, 7, (4, 2, 3))
    if kind == "ignored":
        target[0, 1] = target[3, 0, 2] = -100
    if kind == "soft":
        target = rng.exponential(size=x.shape)
    tx = torch.tensor(x, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(
        tx,
        torch.tensor(target),
        None if w is None else torch.tensor(w),
        reduction=reduction,
        label_smoothing=smoothing,
    )
    dloss = rng.standard_normal(theirs.shape)
    theirs.backward(torch.tensor(dloss))
    options: dict[str, Any] = {"axis": 1, "reduction": reduction, "label_smoothing": smoothing}
    ours = reference.cross_entropy(x, target, w, **options)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-13)
    grad = reference.cross_entropy_grad(x, target, w, dloss=dloss, **options)
    assert tx.grad is not None
    np.testing.assert_allclose(grad, tx.grad.numpy(), rtol=1e-12, atol=1e-15)
    assert np.abs(grad).max() > 1e-3


@pytest.mark.parametrize("kind", ["integer", "ignored", "soft"])
def test_torch_agrees_on_the_k_dimensional_head(kind):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    x, w, b = (rng.standard_normal(s) for s in ((4, 3), (5, 2, 2, 3), (5, 2, 2)))
    target = rng.integers(0, 5, (4, 2, 2))
    if kind == "ignored":
        target[0] = target[2, 1] = -100
    if kind == "soft":
        target = rng.exponential(size=(4, 5, 2, 2))
    args = [torch.tensor(a, requires_grad=True) for a in (x, w, b)]
    logits = (args[0] @ args[1].reshape(20, 3).T).reshape(4, 5, 2, 2) + args[2]
    theirs = torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none")
    dloss = rng.standard_normal((4, 2, 2))
    theirs.backward(torch.tensor(dloss))
    if kind == "ignored":
        x[0] = NAN  # all four of its targets are ignored
    ours = reference.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-13)
    grads = reference.linear_cross_entropy_grad(x, w, target, linear_bias=b, reduction="none", dloss=dloss)
    for grad, arg in zip(grads, args, strict=True):
        assert grad is not None
        assert arg.grad is not None
        np.testing.assert_allclose(grad, arg.grad.numpy(), rtol=1e-12, atol=1e-14)
