"""Orthogonalisation of Muon for many matrices, on many devices.

Muon (https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by a nearly
orthogonal matrix, by Newton-Schulz iterations: products of the matrix with itself. Left to the
partitioner, a matrix divided over devices is gathered for each of these products, and every matrix
of every layer is compiled separately. Here matrices of one shape, of all layers and experts, are
one array [n, a, b]; on a mesh each device gets n / devices full matrices, so the only communication
is every matrix once there and once back.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; its slope at zero is what counts


class MuonState(NamedTuple):
  """The state of `scale_by_muon`: int32 steps taken, and momenta, a tree like the parameters."""

  count: jax.Array
  mu: Any


def scale_by_muon(
  axes_of: Callable[[Any], Any], steps: int, beta: float, mesh: Mesh | None = None
) -> optax.GradientTransformation:
  """Nesterov momentum, orthogonalised: `optax.contrib.scale_by_muon`, all matrices at a time.

  Args:
    axes_of: updates -> a tree like them of strings, one letter per array axis: I in, O out, any
      other letter counts matrices.
    steps: Newton-Schulz iterations.
    beta: decay of the momentum.
    mesh: the devices to share the work; default: one.
  """

  def init(params: Any) -> MuonState:
    return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

  def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
    del params
    count = state.count + 1
    mu = optax.tree.update_moment(updates, state.mu, beta, 1)
    ahead = jax.tree.map(
      lambda m, g: beta * m + (1 - beta) * g,
      optax.tree.bias_correction(mu, beta, count + 1),
      optax.tree.bias_correction(updates, beta, count),
    )
    leaves, tree = jax.tree.flatten(ahead)
    axes = jax.tree.leaves(axes_of(updates))
    return tree.unflatten(orthogonalise(leaves, axes, steps, mesh)), MuonState(count, mu)

  return optax.GradientTransformation(init, update)  # ty: ignore[invalid-argument-type]  # of optax


def orthogonalise(
  arrays: Sequence[jax.Array], axes: Sequence[str], steps: int, mesh: Mesh | None = None
) -> list[jax.Array]:
  """Replaces the matrices of each array by nearly orthogonal ones; see `scale_by_muon`."""
  groups: dict[tuple[int, ...], list[int]] = {}
  matrices = [_matrices(x, letters) for x, letters in zip(arrays, axes, strict=True)]
  for i, matrix in enumerate(matrices):
    groups.setdefault(matrix.shape[1:], []).append(i)
  orthogonal = list(matrices)
  for members in groups.values():
    counts = [matrices[i].shape[0] for i in members]
    together = jnp.concatenate([matrices[i] for i in members])
    together = _newton_schulz_on(mesh, together, steps)
    ends = [sum(counts[: k + 1]) for k in range(len(counts) - 1)]
    for i, part in zip(members, jnp.split(together, ends), strict=True):
      orthogonal[i] = part
  return [_put_back(m, x, letters) for m, x, letters in zip(orthogonal, arrays, axes, strict=True)]


def newton_schulz(x_nab: jax.Array, steps: int) -> jax.Array:
  """Brings the singular values of n matrices [a, b], a <= b, to between 0.7 and 1.2 or so."""
  one, three, five = COEFFICIENTS
  x_nab = x_nab / (jnp.linalg.norm(x_nab, axis=(1, 2), keepdims=True) + 1e-8)

  def iterate(_: int, x: jax.Array) -> jax.Array:
    gram = jnp.einsum("nab,ncb->nac", x, x)
    return one * x + jnp.einsum("nac,ncb->nab", three * gram + five * (gram @ gram), x)

  return lax.fori_loop(0, steps, iterate, x_nab)


def _newton_schulz_on(mesh: Mesh | None, x_nab: jax.Array, steps: int) -> jax.Array:
  if mesh is None or mesh.size == 1:
    return newton_schulz(x_nab, steps)
  n = x_nab.shape[0]
  each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  x_nab = jnp.pad(x_nab, ((0, -n % mesh.size), (0, 0), (0, 0)))
  x_nab = lax.with_sharding_constraint(x_nab, each)
  return lax.with_sharding_constraint(newton_schulz(x_nab, steps), each)[:n]


def _order(axes: str) -> list[int]:
  """The order of axes: those that count matrices, then I, then O."""
  return sorted(range(len(axes)), key=lambda i: {"I": 1, "O": 2}.get(axes[i], 0))


def _sides(shape: tuple[int, ...], axes: str) -> tuple[int, int]:
  sides = {"I": 1, "O": 1}
  for letter, size in zip(axes, shape, strict=True):
    sides[letter] = sides.get(letter, 1) * size
  return sides["I"], sides["O"]


def _matrices(x: jax.Array, axes: str) -> jax.Array:
  """The matrices of an array, [n, a, b] with a <= b."""
  rows, columns = _sides(x.shape, axes)
  x_nio = x.transpose(_order(axes)).reshape(-1, rows, columns)
  return x_nio if rows <= columns else x_nio.swapaxes(1, 2)


def _put_back(x_nab: jax.Array, like: jax.Array, axes: str) -> jax.Array:
  rows, columns = _sides(like.shape, axes)
  x_nio = x_nab if rows <= columns else x_nab.swapaxes(1, 2)
  order = _order(axes)
  inverse = sorted(range(len(order)), key=order.__getitem__)
  return x_nio.reshape([like.shape[i] for i in order]).transpose(inverse)
