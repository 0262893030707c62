"""The waist: pattern, budget, select, support, shrink and their siblings. Knows no model and no kernel."""

from .allocation import allocation, by_sensitivity, er, erk, uniform
from .budget import Above, Budget, Density, Gaussian, Keep, Mass, above, density, gaussian, keep, mass
from .dictionary import select_from_dictionary
from .dropgrow import DropGrow
from .explore import Explore
from .pattern import Pattern, pattern
from .policy import Always, OneShot, Policy, Ramp
from .registry import Method, get_method, method, methods
from .regroup import regroup, select_regrouped
from .schedule import Constant, Cosine, Cubic, Exponential, Linear, Schedule, Step, Until
from .search import Search
from .select import select, select_across
from .shrink import Attenuate, Shrink, StraightThrough, hard, soft, straight_through
from .sparsifier import Score, Solver, Sparsifier, Stats, budget_for
from .support import Support

__all__ = [
    "Above",
    "Always",
    "Attenuate",
    "Budget",
    "Constant",
    "Cosine",
    "Cubic",
    "Density",
    "DropGrow",
    "Explore",
    "Exponential",
    "Gaussian",
    "Keep",
    "Linear",
    "Mass",
    "Method",
    "OneShot",
    "Pattern",
    "Policy",
    "Ramp",
    "Schedule",
    "Score",
    "Search",
    "Shrink",
    "Solver",
    "Sparsifier",
    "Stats",
    "Step",
    "StraightThrough",
    "Support",
    "Until",
    "above",
    "allocation",
    "budget_for",
    "by_sensitivity",
    "density",
    "er",
    "erk",
    "gaussian",
    "get_method",
    "hard",
    "keep",
    "mass",
    "method",
    "methods",
    "pattern",
    "regroup",
    "select",
    "select_across",
    "select_from_dictionary",
    "select_regrouped",
    "soft",
    "straight_through",
    "uniform",
]
