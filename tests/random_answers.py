"""Random answers from pieces of LaTeX, Python and text, and long ones that repeat one piece."""

import random

PIECES = [
    *r"\frac \dfrac \sqrt \text \left( \right) \{ \} \overline \dot \ldots \cdot \times \pi \infty \circ".split(),
    *r"\le \ge \cup".split(),
    *r"\in \pm \begin{pmatrix} \end{pmatrix} \\ & \mathbb{R} \boxed \textbf \textcolor{red} \langle \rangle".split(),
    *r"\, \! \$ $".split(),
    *"{ } ( ) [ ] ^ _ + - * ** / = < > , . ; : ! % | ' \" ` ~ # ? @ & \\".split(),
    *"0 1 2 12 345 1.5 .5 1,234 1e5 1.5e-05 9**9**9 1/2 1_000 101_2 3:45 2024-01-05 0.(3)".split(),
    *"x y n i e A B C abc sqrt( Fraction( Matrix( exp( log( pi oo True None lambda j".split(),
    *"apples km/h per and or than million dollars pm a.m. The answer is not noon Yes 米 元 偶函数".split(),
    *"² ½ √ π ∞ ≤ − – ’ “ 。 ， ２ ° × ⟨ ⟩ \u200b \u2009 \ud800 \x00 \x08 \x0c é Ω".split(" "),
    *" \t\n",
]


def random_answers(count: int, seed: int = 0) -> list[str]:
    """`count` texts of 1 to 60 pieces; every 50th is one piece or two, over and over, up to 10,000 characters."""
    draw = random.Random(seed)
    texts = []
    for i in range(count):
        if i % 50 == 0:
            unit = "".join(draw.choices(PIECES, k=draw.choice((1, 1, 2, 3)))) or "x"
            texts.append((unit * (10_000 // len(unit)))[: draw.choice((500, 3000, 10_000))])
        else:
            joint = draw.choice(("", "", " "))
            texts.append(joint.join(draw.choices(PIECES, k=draw.randint(1, draw.choice((4, 12, 60))))))
    return texts
