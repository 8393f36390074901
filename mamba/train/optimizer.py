"""AdamW as it is used for Mamba: which parameters decay, and how the learning rate changes."""

from functools import cache

import jax
import optax

__all__ = ["make_optimizer", "weight_decay_mask"]


def weight_decay_mask(params):
    """True for the parameters that decay: matrices, convolutions and the embedding.

    A_log and D do not decay, as in the released code, which marks them. Neither do biases, norms,
    and the constant B, C and Δ of an ablated block.
    -> the same tree, of bools
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


@cache
def make_optimizer(learning_rate, steps, *, warmup=0, end=0.05, weight_decay=0.1, clip=1.0):
    """Gradient clipping, then AdamW with a linear warm-up and a cosine decay.

    Betas are 0.9 and 0.95, as in the paper's Appendix E.2 for language models. The same arguments
    return the same object, so that a step compiled for it is found again.

    Args:
        learning_rate: the highest learning rate.
        steps: number of steps in the whole run.
        warmup: number of steps over which the learning rate rises from 0.
        end: the last learning rate, as a fraction of the highest; 1 keeps it constant.
        weight_decay: how fast the parameters of ``weight_decay_mask`` shrink, per unit of learning
            rate.
        clip: the largest global norm of a gradient; longer ones are scaled down to it.

    Returns:
        An optax.GradientTransformation.

    Raises:
        ValueError: a learning rate, warm-up or end that no run can have.
    """
    if not (learning_rate > 0 and 0 <= warmup < steps and 0 <= end <= 1):
        raise ValueError(
            "expected learning_rate > 0, 0 <= warmup < steps and 0 <= end <= 1, got "
            f"{learning_rate}, {warmup} of {steps}, and {end}"
        )
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=end * learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b2=0.95, weight_decay=weight_decay, mask=weight_decay_mask),
    )
