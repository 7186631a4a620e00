"""What the optimizer tests share: seeded parameters, gradients, and runs over whole tensors or fragments of them."""

import torch

SHAPES = [(7, 5), (70_000,), (3,), (2, 3, 4)]


def make_params(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def make_grads(params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(param.shape, generator=generator) for param in params] for _ in range(steps)]


def take_steps(optimizer, params, grads_per_step):
    for grads in grads_per_step:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad if grad is None else grad.clone()
        optimizer.step()
    return [param.detach().clone() for param in params]


def flat_fragments(tensors, num_shards):
    """Lay tensors end to end, cut the whole into equal shards; return each shard's fragments, empty ones included."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    flat = torch.cat([flat, flat.new_zeros(-flat.numel() % num_shards)])
    size = flat.numel() // num_shards
    shards, start = [[] for _ in range(num_shards)], 0
    for tensor in tensors:
        stop = start + tensor.numel()
        for rank, fragments in enumerate(shards):
            low, high = max(start, rank * size), min(stop, (rank + 1) * size)
            fragments.append(flat[low : max(low, high)])
        start = stop
    return shards


def joined(fragments_of_shards, tensors):
    """Put the fragments of all shards together again, in the shapes of `tensors`."""
    return [
        torch.cat([shard[index].detach() for shard in fragments_of_shards]).view(tensor.shape)
        for index, tensor in enumerate(tensors)
    ]
