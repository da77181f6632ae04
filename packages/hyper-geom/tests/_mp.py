"""Reference geometry with mpmath at 90 digits, on the exact values of the stored inputs.

Ambient coordinates, time first, are written out with the textbook formulas of the hyperboloid; nothing here shares a
formula with the package.
"""

from mpmath.ctx_mp import MPContext

# A context of its own: other tests may set the precision of the shared one.
mp = MPContext()
mp.dps = 90


def vec(x):
    """A list of mpf from a 1-D tensor."""
    return [mp.mpf(value) for value in x.tolist()]


def number(c):
    return mp.mpf(float(c))


def edot(a, b):
    return mp.fdot(a, b)


def ambient(x, c):
    return [mp.sqrt(1 / c + edot(x, x)), *x]


def ldot(a, b):
    return edot(a[1:], b[1:]) - a[0] * b[0]


def combine(*terms):
    """Sum of (factor, vector) terms."""
    return [mp.fsum(f * v[i] for f, v in terms) for i in range(len(terms[0][1]))]


def tangent(x, v, c):
    """Ambient tangent vector at the ambient point x from its space components."""
    return [edot(x[1:], v) / x[0], *v]


def dist(x, y, c):
    X, Y = ambient(x, c), ambient(y, c)
    return mp.acosh(mp.mpf(max(mp.mpf(1), -c * ldot(X, Y)))) / mp.sqrt(c)


def norm(x, v, c):
    V = tangent(ambient(x, c), v, c)
    return mp.sqrt(ldot(V, V))


def exp_map(x, v, c):
    X, k, n = ambient(x, c), mp.sqrt(c), norm(x, v, c)
    V = tangent(X, v, c)
    return combine((mp.cosh(k * n), X), (mp.sinh(k * n) / (k * n), V))[1:]


def log_map(x, y, c):
    X, Y, d = ambient(x, c), ambient(y, c), dist(x, y, c)
    W = combine((mp.mpf(1), Y), (c * ldot(X, Y), X))
    return combine((d / mp.sqrt(ldot(W, W)), W))[1:]


def parallel_transport(x, y, v, c):
    X, Y = ambient(x, c), ambient(y, c)
    V = tangent(X, v, c)
    factor = ldot(Y, V) / (1 / c - ldot(X, Y))
    return combine((mp.mpf(1), V), (factor, X), (factor, Y))[1:]


def midpoint(points, weights, c):
    S = combine(*((w, ambient(x, c)) for w, x in zip(weights, points, strict=True)))
    return combine((1 / (mp.sqrt(c) * mp.sqrt(-ldot(S, S))), S))[1:]


def geodesic(x, y, t, c):
    V = log_map(x, y, c)
    return exp_map(x, [t * a for a in V], c)


def exterior_angle(x, y, c):
    """pi minus the angle at x between the geodesics to the origin and to y."""
    origin = [mp.mpf(0)] * len(x)
    U, V = log_map(x, origin, c), log_map(x, y, c)
    X = ambient(x, c)
    U, V = tangent(X, U, c), tangent(X, V, c)
    cosine = ldot(U, V) / mp.sqrt(ldot(U, U) * ldot(V, V))
    return mp.pi - mp.acos(max(mp.mpf(-1), min(mp.mpf(1), cosine)))


def half_aperture(x, c, min_radius):
    r = mp.asinh(mp.sqrt(c * edot(x, x)))
    return mp.asin(min(mp.mpf(1), 2 * mp.mpf(min_radius) / mp.sinh(r)))


def to_ball(x, c):
    return [a / (1 + mp.sqrt(c) * ambient(x, c)[0]) for a in x]


def from_ball(p, c):
    return [2 * a / (1 - c * edot(p, p)) for a in p]


def ball_dist(p, q, c):
    return dist(from_ball(p, c), from_ball(q, c), c)


def tangent0_dist(u, v, c):
    """Law of cosines; the radii may be huge."""
    k = mp.sqrt(c)
    a, b = k * mp.sqrt(edot(u, u)), k * mp.sqrt(edot(v, v))
    cosine = edot(u, v) * c / (a * b) if a and b else mp.mpf(0)
    return mp.acosh(max(mp.mpf(1), mp.cosh(a) * mp.cosh(b) - mp.sinh(a) * mp.sinh(b) * cosine)) / k


def relative_error(value, reference):
    """|value - reference| / |reference|, absolute where the reference is 0; vectors by Euclidean norm."""
    if isinstance(reference, list):
        difference = mp.sqrt(mp.fsum((mp.mpf(float(a)) - b) ** 2 for a, b in zip(value, reference, strict=True)))
        size = mp.sqrt(edot(reference, reference))
    else:
        difference, size = abs(mp.mpf(float(value)) - reference), abs(reference)
    return float(difference / size) if size else float(difference)
