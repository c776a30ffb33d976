# %% [markdown]
# # The loss and its statistics in PyTorch
#
# Each cell runs on its own after those above it; editors and Jupyter (with jupytext) show this file as a notebook.

# %%
import torch
import torch.nn.functional as F

import torch_ops

torch.manual_seed(0)
logits = torch.randn(6, 10, requires_grad=True)
target = torch.tensor([3, 1, 4, -100, 5, 9])

# %% [markdown]
# `torch_ops.cross_entropy` answers as `F.cross_entropy` does wherever that accepts a call.

# %%
loss = torch_ops.cross_entropy(logits, target, label_smoothing=0.1)
torch.testing.assert_close(loss, F.cross_entropy(logits, target, label_smoothing=0.1))
print(loss)

# %% [markdown]
# A confident row keeps its digits. The built-in's loss is 0 here, and with it the gradient of the target.

# %%
confident, right = torch.tensor([[60.0, 0, 0, 0, 0]], requires_grad=True), torch.tensor([0])
theirs = F.cross_entropy(confident, right)
ours = torch_ops.cross_entropy(confident, right)
print(theirs.item(), ours.item())  # in truth 4 exp(-60) = 3.5e-26
assert theirs == 0
torch.testing.assert_close(ours.double(), 4 * torch.tensor(-60.0, dtype=torch.float64).exp(), rtol=1e-6, atol=0)
print(torch.autograd.grad(theirs, confident)[0][0, 0], torch.autograd.grad(ours, confident)[0][0, 0])

# %% [markdown]
# Per-row statistics come with the loss, each with its own exact gradient.

# %%
loss, stats = torch_ops.cross_entropy(logits, target, z_loss=1e-4, stats=("logprob", "entropy", "argmax"))
print(stats["entropy"])
(gradient,) = torch.autograd.grad(stats["entropy"].sum(), logits)
assert gradient[3].eq(0).all()  # the ignored row

# %% [markdown]
# The head and its loss in one: the logits of all rows are never stored.

# %%
hidden, head = torch.randn(6, 16, requires_grad=True), torch.randn(10, 16, requires_grad=True)
loss = torch_ops.linear_cross_entropy(hidden, head, target)
torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, head), target))
loss.backward()

# %% [markdown]
# Derivatives of every order, in both modes, under every transform.

# %%
hessian = torch.func.hessian(lambda x: torch_ops.cross_entropy(x, target[:2]))(logits.detach()[:2])
print(hessian.shape)
torch.testing.assert_close(hessian, hessian.permute(2, 3, 0, 1))
per_row = torch.func.grad(lambda x, t: torch_ops.cross_entropy(x, t))
per_sample = torch.func.vmap(per_row)(logits.detach()[:3], target[:3])
print(per_sample.shape)
