"""Figures with a slider for the first chapters, each one call: ``stability()`` and its neighbours.

All are ``frames``: buttons, one picture for each value, a sentence that says what it shows, and no
script. They compute in NumPy, from closed forms, so that a page may set them beside its own code.
"""

import matplotlib.pyplot as plt
import numpy as np

from mamba_book.figures import COLORS
from mamba_book.interactive import frames

__all__ = ["delta_gate", "leaky_bank", "spring_twin", "stability"]

STIFFNESS = 4.0  # of the spring, 1/s², with a mass of 1 kg: x″ = −4 x − friction · x′ + 4 u


def _poles(friction):
    """The two eigenvalues of the mass on its spring, in 1/s."""
    return np.roots([1.0, friction, STIFFNESS]).astype(complex)


def _free(friction, t):
    """Where the mass is, let go at 1 at rest: exact, at the times t."""
    a, b = _poles(friction)
    return ((a * np.exp(b * t) - b * np.exp(a * t)) / (a - b)).real


RULES = {  # what a step of length Δ multiplies a mode by, with z = Δλ; colour, marker, its size
    "bilinear": (lambda z: (1 + z / 2) / (1 - z / 2), "ink", "s", 8),
    "Euler": (lambda z: 1 + z, "wrong", "o", 4),
    "zero-order hold": (np.exp, "h", "o", 4),
}


def stability():
    """Three rules against Δ: where Δλ lies, and the oscillation that comes out."""
    friction, end = 0.6, 8.0
    a, b = _poles(friction)

    def draw(delta):
        fig, (plane, path) = plt.subplots(2, 1, figsize=(5.2, 5.4), height_ratios=(1.2, 1))
        plane.axvspan(-3, 0, color=COLORS["ref"], alpha=0.13, lw=0)
        plane.add_patch(plt.Circle((-1, 0), 1, color=COLORS["wrong"], alpha=0.25, lw=0))
        for value in (a, b):
            plane.plot(delta * value.real, delta * value.imag, "o", color=COLORS["ink"], ms=7)
        plane.set(xlim=(-3, 1), ylim=(-2, 2), aspect="equal", xlabel="Re Δλ", ylabel="Im Δλ")
        plane.text(-1, 0, "Euler", ha="center", va="center")
        plane.text(-2.9, 1.85, "zero-order hold,\nbilinear", va="top")
        t = np.linspace(0, end, 400)
        path.plot(t, _free(friction, t), color=COLORS["ref"], lw=5, alpha=0.5)
        steps = np.arange(int(end / delta) + 1)
        for (name, (factor, color, marker, size)), place in zip(
            RULES.items(), (0, 0.3, 1), strict=True
        ):
            p, q = factor(a * delta), factor(b * delta)
            x = ((a * q**steps - b * p**steps) / (a - b)).real
            shown = steps * delta, np.clip(x, -3, 3)
            look = {"color": COLORS[color], "marker": marker, "ms": size, "lw": 1.2}
            path.plot(*shown, mfc="none" if marker == "s" else None, **look)
            side = {"ha": "right" if place == 1 else "left", "transform": path.transAxes}
            path.text(place, 1.03, name, color=COLORS[color], **side)
        path.set(xlim=(0, end), ylim=(-2, 2), xlabel="time (s)", ylabel="position")
        size = abs(1 + a * delta)
        fate = "grows" if size > 1 else "decays"
        return fig, (
            f"Δ = {delta} s. Euler multiplies the oscillation by {size:.2f} in a step, so it "
            f"{fate}; the exact factor is {abs(np.exp(a * delta)):.2f}."
        )

    frames(
        draw,
        {"Δ (s)": [0.05, 0.1, 0.2, 0.4, 0.6, 0.8]},
        start=(0.2,),
        alt="Above: the plane of Δλ with the disc where Euler is stable and the half plane where "
        "the others are; two points move outwards as Δ grows. Below: the oscillation by each rule. "
        "Euler's explodes when the points have left its disc.",
    )


def spring_twin():
    """The mass on its spring, and its discrete twin: one step per sample, by ZOH."""
    end = 10.0

    def response(friction, t):  # to an input of 1 that is switched on at 0
        return 1 - _free(friction, t)

    def position(friction, t):  # on at 0, off at 4 s
        late = np.where(t > 4, response(friction, np.maximum(t - 4, 0)), 0)
        return response(friction, t) - late

    def draw(friction, delta):
        fig, ax = plt.subplots(figsize=(5.2, 2.9))
        t = np.linspace(0, end, 500)
        ax.fill_between(t, (t < 4) * 1.0, color=COLORS["x"], alpha=0.2, lw=0, step="post")
        ax.plot(t, position(friction, t), color=COLORS["ref"], lw=4, alpha=0.5)
        times = np.arange(0, end + 1e-9, delta)
        ax.vlines(times, 0, position(friction, times), color=COLORS["h"], lw=1, alpha=0.6)
        ax.plot(times, position(friction, times), "o", color=COLORS["h"], ms=5)
        ax.text(2, -0.1, "push", color=COLORS["x"], ha="center", va="top")
        ax.set(xlim=(-0.1, end + 0.1), ylim=(-0.9, 1.9), xlabel="time (s)", ylabel="position")
        half = np.log(2) / -_poles(friction).real.max()
        swings = "swings" if friction**2 < 4 * STIFFNESS else "creeps back without swinging"
        per_step = np.exp(_poles(friction).real.max() * delta)
        return fig, (
            f"With friction {friction} the mass {swings}, and half of what is left is gone every "
            f"{half:.1f} s. The twin with Δ = {delta} s keeps {per_step:.0%} in a step."
        )

    frames(
        draw,
        {"friction (N per m/s)": [0.2, 0.6, 2.0, 5.0], "Δ (s)": [0.25, 0.5, 1.0]},
        start=(0.6, 0.5),
        alt="Position of a mass that is pushed for four seconds and then let go: the exact curve, "
        "and on it the points of the discrete twin. Friction changes how it swings, Δ how often it "
        "is computed.",
    )


def leaky_bank():
    """One signal, and what leaky integrators with different time constants remember of it."""
    rng = np.random.default_rng(3)
    step, n = 0.05, 400
    t = step * np.arange(n)
    signal = np.repeat(rng.choice([0.0, 0.4, 1.0], n // 25), 25)  # a level every 1.25 s

    def draw(tau):
        keep = np.exp(-step / tau)
        h = np.zeros(n)
        for k in range(1, n):
            h[k] = keep * h[k - 1] + (1 - keep) * signal[k - 1]
        age = t[-1] - t
        fig, (above, below) = plt.subplots(2, 1, figsize=(5.2, 3.9), sharex=True)
        above.fill_between(t, signal, color=COLORS["x"], alpha=0.3, lw=0, step="post")
        above.plot(t, h, color=COLORS["h"])
        above.text(0, 1.03, "signal", color=COLORS["x"], transform=above.transAxes)
        above.text(0.2, 1.03, "state", color=COLORS["h"], transform=above.transAxes)
        above.set(ylim=(0, 1.1), ylabel="signal, state")
        below.fill_between(t, np.exp(-age / tau), color=COLORS["h"], alpha=0.35, lw=0)
        below.set(
            ylim=(0, 1.1),
            xlim=(0, 20),
            xticks=range(0, 21, 5),
            xlabel="time (s)",
            ylabel="weight at the end",
        )
        return fig, (
            f"A time constant of {tau} s: the state is a mean of the last {tau} s or so; what lies "
            f"{2 * tau} s back counts {np.exp(-2.0):.0%} of what is new."
        )

    frames(
        draw,
        {"time constant (s)": [0.25, 0.5, 1, 2, 4, 8]},
        start=(1,),
        alt="Above, a signal of steps and the state of a leaky integrator that follows it; below, "
        "the weight with which each moment counts in the state at the end. A longer time constant "
        "gives a smoother state and a longer weight.",
    )


def delta_gate():
    """Δ as a gate by two rules: how much of one token a state takes in, the others as they are."""
    tokens = np.array([0.6, 0.5, 0.7, 0.6, -0.9, 0.5, 0.6, 0.4, 0.6, 0.5])
    place, usual, floor = 4, 0.3, -3.0  # which token's Δ the reader sets, that of the others
    rules = {  # the weight of the token
        "zero-order hold": lambda delta: 1 - np.exp(-delta),
        "Mamba's mix": lambda delta: delta,
    }

    def draw(rule, delta):
        steps = np.full(len(tokens), usual)
        steps[place] = delta
        h, states = 0.0, []
        for x, d in zip(tokens, steps, strict=True):
            h = np.exp(-d) * h + rules[rule](d) * x
            states.append(h)
        fig, ax = plt.subplots(figsize=(5.2, 3.4))
        colors = [COLORS["x"]] * len(tokens)
        colors[place] = COLORS["delta"]
        ax.bar(range(len(tokens)), tokens, color=colors, alpha=0.5, width=0.6)
        ax.step(range(len(tokens)), np.maximum(states, floor), where="mid", color=COLORS["h"])
        ax.axhline(0, color=COLORS["ref"], lw=1)
        ax.text(place, 0.72, f"Δ = {delta}", color=COLORS["delta"], ha="center", va="bottom")
        if states[place] < floor:
            down = {"color": COLORS["h"], "ha": "right", "va": "bottom"}
            ax.text(place - 0.6, floor, f"to {states[place]:.1f} ↓".replace("-", "−"), **down)
        ax.set(xlabel="token", ylabel="token, state", ylim=(floor, 1), xticks=range(len(tokens)))
        keeps, takes = np.exp(-delta), rules[rule](delta)
        return fig, (
            f"By {rule} with Δ = {delta} the state keeps {keeps:.0%} of what it was and adds "
            f"{takes:.3g} times the token: the two weights add up to {keeps + takes:.3g}."
        )

    frames(
        draw,
        {"rule": list(rules), "Δ of the odd token": [0, 0.1, 0.3, 1, 3, 10]},
        start=("Mamba's mix", 3),
        alt="Ten tokens as bars, one of them negative, and the state as a line. With Δ = 0 at the "
        "odd token the state passes over it. With a large Δ it forgets the rest; by zero-order "
        "hold it becomes the token, by Mamba's mix Δ times the token.",
    )
