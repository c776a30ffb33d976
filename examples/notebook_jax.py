# %% [markdown]
# # The loss and its statistics in JAX
#
# Each cell runs on its own after those above it; editors and Jupyter (with jupytext) show this file as a notebook.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_ops

logits = jax.random.normal(jax.random.key(0), (6, 10))
target = jnp.array([3, 1, 4, -100, 5, 9])

# %% [markdown]
# optax's two losses by their own names, and `cross_entropy` with the options of PyTorch's.

# %%
labels = target.at[3].set(0)
ours = jax_ops.softmax_cross_entropy_with_integer_labels(logits, labels)
np.testing.assert_allclose(ours, optax.softmax_cross_entropy_with_integer_labels(logits, labels), rtol=1e-5)
print(jax_ops.cross_entropy(logits, target, label_smoothing=0.1))

# %% [markdown]
# A confident row keeps its digits. optax's loss is 0 here, and with it the gradient of the target.

# %%
confident = jnp.array([60.0, 0, 0, 0, 0])
theirs = jax.value_and_grad(optax.softmax_cross_entropy_with_integer_labels)(confident, 0)
ours = jax.value_and_grad(jax_ops.softmax_cross_entropy_with_integer_labels)(confident, jnp.array(0))
print(theirs[0], ours[0])  # in truth 4 exp(-60) = 3.5e-26
print(theirs[1][0], ours[1][0])
assert theirs[0] == 0
np.testing.assert_allclose(float(ours[0]), 4 * np.exp(-60.0), rtol=1e-6)

# %% [markdown]
# Per-row statistics come with the loss, each with its own exact gradient.

# %%
loss, stats = jax_ops.cross_entropy(logits, target, z_loss=1e-4, stats=("logprob", "entropy", "argmax"))
print(stats["entropy"])


def total_entropy(x: jax.Array) -> jax.Array:
    return jax_ops.cross_entropy(x, target, stats=("entropy",))[1]["entropy"].sum()


assert not jax.grad(total_entropy)(logits)[3].any()  # the ignored row

# %% [markdown]
# The head and its loss in one: the logits of all rows are never stored.

# %%
hidden = jax.random.normal(jax.random.key(1), (6, 16))
head = jax.random.normal(jax.random.key(2), (10, 16))
loss, (dx, dw) = jax.jit(jax.value_and_grad(jax_ops.linear_cross_entropy, (0, 1)))(hidden, head, target)
print(loss, dx.shape, dw.shape)

# %% [markdown]
# Forward mode works through the `custom_vjp`, in any order and combination.

# %%
tangent = jnp.ones_like(logits)
value, change = jax.jvp(lambda x: jax_ops.cross_entropy(x, target), (logits,), (tangent,))
np.testing.assert_allclose(change, 0.0, atol=1e-6)  # a common offset of all logits changes nothing
hessian = jax.jit(jax.hessian(lambda x: jax_ops.cross_entropy(x, target[:2])))(logits[:2])
np.testing.assert_allclose(hessian, hessian.transpose(2, 3, 0, 1), atol=1e-6)
print(hessian.shape)
