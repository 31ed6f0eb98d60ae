"""Oracles of the CRF in plain Python: lists, loops and math.exp. Nothing of the layer is used here."""

import itertools
import math


def gauss(a: list[float], b: list[float]) -> float:
    return math.exp(-0.5 * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def degrees(points: list[list[float]]) -> list[float]:
    return [sum(gauss(p, other) for other in points) for p in points]


def kernel(points: list[list[float]]) -> list[list[float]]:
    """Normalise symmetrically; a token sends itself no message."""
    degree, n = degrees(points), range(len(points))
    return [[gauss(points[i], points[j]) / math.sqrt(degree[i] * degree[j]) if i != j else 0.0 for j in n] for i in n]


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def messages(kernels, compatibility, q) -> list[list[float]]:
    """sum_h S^h q M^h."""
    n, num_states = range(len(q)), range(len(q[0]))
    return [
        [
            sum(
                s[i][j] * q[j][k] * m[k][state]
                for s, m in zip(kernels, compatibility, strict=True)
                for j in n
                for k in num_states
            )
            for state in num_states
        ]
        for i in n
    ]


def meanfield(unary, kernels, compatibility, iterations: int, damping: float) -> list[list[list[float]]]:
    """One clip: the marginals before the first iteration and after each."""
    eta = 1 / (1 + damping)
    logits = [list(row) for row in unary]
    marginals = [[softmax(row) for row in logits]]
    for _ in range(iterations):
        message = messages(kernels, compatibility, marginals[-1])
        logits = [
            [(1 - eta) * a + eta * (u + m) for a, u, m in zip(*rows, strict=True)]
            for rows in zip(logits, unary, message, strict=True)
        ]
        marginals.append([softmax(row) for row in logits])
    return marginals


def free_energy(unary, kernels, compatibility, q) -> float:
    message = messages(kernels, compatibility, q)
    return sum(
        p * math.log(p) - p * (u + 0.5 * m) if p > 0 else 0.0
        for rows in zip(q, unary, message, strict=True)
        for p, u, m in zip(*rows, strict=True)
    )


def enumerate_labelings(unary, kernels, compatibility) -> tuple[float, list[list[float]]]:
    """log Z and the exact marginals, over all labelings."""
    n, num_states = len(unary), len(unary[0])
    total, marginals = 0.0, [[0.0] * num_states for _ in range(n)]
    for z in itertools.product(range(num_states), repeat=n):
        score = sum(unary[i][z[i]] for i in range(n))
        for s, m in zip(kernels, compatibility, strict=True):
            score += sum(s[i][j] * m[z[i]][z[j]] for i in range(n) for j in range(i + 1, n))
        weight = math.exp(score)
        total += weight
        for i in range(n):
            marginals[i][z[i]] += weight
    return math.log(total), [[w / total for w in row] for row in marginals]


def chain_marginals(unary, weights: list[float], compatibility) -> list[list[float]]:
    """Exact marginals of a chain with pair potentials weights[i] * M between i and i + 1, forward and backward."""
    n, states = len(unary), range(len(unary[0]))
    own = [[math.exp(u) for u in row] for row in unary]
    edge = [[[math.exp(w * compatibility[k][m]) for m in states] for k in states] for w in weights]
    forward, backward = [own[0]], [[1.0 for _ in states]]
    for i in range(1, n):
        forward.append([own[i][m] * sum(forward[-1][k] * edge[i - 1][k][m] for k in states) for m in states])
    for i in range(n - 2, -1, -1):
        backward.append([sum(edge[i][k][m] * own[i + 1][m] * backward[-1][m] for m in states) for k in states])
    products = [[f * b for f, b in zip(*rows, strict=True)] for rows in zip(forward, backward[::-1], strict=True)]
    return [[p / sum(row) for p in row] for row in products]
