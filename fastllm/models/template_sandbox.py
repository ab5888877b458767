"""A Jinja environment in which a hostile template can neither escape nor run for long.

Chat templates come with model files, so they are programs of strangers. Jinja's sandbox keeps them
from Python's internals but not from `range(10**5)` nested four deep or `'a' * 10**10`. Signals work
in the main thread only, a trace function cannot interrupt C code, and a child process costs more
than the model's tokenizer. So cost is counted, not timed: a `Budget` is charged before anything is
done. That is sound because every way to spend is shut or metered:

- loops and macros: `instrument` puts a charge of the body's size at the head of each body;
- operators: `+ * ** %` are intercepted, `~`, comparisons and slices rewritten into metered filters;
- calls and filters: only those listed here exist; arguments are weighed first, growth is predicted;
- containers are weighed as trees, so a small graph that prints as 2^40 nodes is charged as such.

The same template and messages always cost the same, on every machine and in every thread.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes, runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range
from jinja2.utils import Joiner, Namespace
from jinja2.visitor import NodeTransformer

from fastllm.errors import ChatTemplateError
from fastllm.models.template_costs import (
    CHARS_PER_UNIT,
    GROWTH,
    MAX_DEPTH,
    SHALLOW,
    Budget,
    check_ints,
    grow_format,
    materialized,
    small,
    units,
)

_STR_METHODS = frozenset(
    "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit"
    " islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix"
    " removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip"
    " swapcase title upper".split()
)
_LIST_METHODS = frozenset(("copy", "count", "index"))
_DICT_METHODS = frozenset(("get", "items", "keys", "values"))
_LOOP_METHODS = frozenset(("changed", "cycle"))
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float groupby indent int items join"
    " last length list lower map max min reject rejectattr replace reverse round safe select"
    " selectattr sort string sum title trim unique upper"
).split()


class _SafeNamespace(Namespace):
    """namespace() whose text does not show its values: they may contain the namespace itself."""

    def __repr__(self) -> str:
        return "<namespace>"


class GenerationBlock(ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; rendering
    passes its content through."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it as an instance attribute)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Instrument(NodeTransformer):
    """Rewrites a parsed template so that everything it does is charged. `cost` counts the nodes
    and the literal text passed so far; a body is charged its own share each time it runs."""

    def __init__(self) -> None:
        self.cost = 0

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self.cost += 1
        return super().generic_visit(node, *args, **kwargs)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        self.cost += 1 + len(node.data) // CHARS_PER_UNIT
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        self.cost += 1 + (len(node.value) // CHARS_PER_UNIT if isinstance(node.value, str) else 0)
        return small(node)

    def _body(self, node: Any) -> nodes.Node:
        before = self.cost
        self.generic_visit(node)
        charge = _filter(nodes.Const(self.cost - before), "!spend")
        node.body.insert(0, nodes.ExprStmt(charge))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(charge, node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            is_lookup = operand.op in ("in", "notin")
            operand.expr = _weighed(operand.expr, "!searched" if is_lookup else "!weighed")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "!concat")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter(node.node, "!slice", *(b or nodes.Const(None) for b in bounds))

    def _refuse(self, node: nodes.Node) -> NoReturn:
        kind = type(node).__name__.lower().replace("scopedevalcontextmodifier", "autoescape")
        raise ChatTemplateError(
            f"the chat template uses {kind!r} in line {node.lineno}, which is not available: a"
            " chat template is one file without autoescaping"
        )

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse
    visit_ScopedEvalContextModifier = visit_EvalContextModifier = _refuse


def _filter(value: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    # A direct call in the compiled code (80 ns). Names with "!" cannot be written in a template.
    return nodes.Filter(value, name, list(args), [], None, None)


def _weighed(node: nodes.Expr, how: str = "!weighed") -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter(node, how)


def instrument(tree: nodes.Template) -> nodes.Template:
    """The template with every loop, macro, comparison, concatenation and slice metered."""
    return _Instrument().visit(tree)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of one rendering: it owns the budget. Making one takes some 60 us."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, work: int) -> None:
        self.budget = Budget(work)
        self._depth = 0
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, ext.loopcontrols],
            finalize=_finalize,
            optimized=False,  # constant folding would run the template's work while compiling
            cache_size=0,
        )
        plain = self.filters
        self.filters = {name: self._metered(name, plain[name]) for name in _FILTERS}
        self.filters["tojson"] = self._tojson
        self.filters["!spend"] = self.budget.spend
        self.filters["!weighed"] = self._weighed
        self.filters["!searched"] = self._searched
        self.filters["!concat"] = self._concat
        self.filters["!slice"] = self._slice
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: self._metered(name, test) for name, test in tests.items()}
        allowed = {"range": _range, "dict": _new_dict, "namespace": _SafeNamespace}
        allowed |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals = {**allowed, "joiner": Joiner}
        self._functions = tuple(self.globals.values())

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` (filter or test), its arguments weighed and its growth predicted first."""
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # context or environment
        growth = GROWTH.get(name)

        @functools.wraps(function)  # keeps jinja_pass_arg
        def metered(*args: Any, **kwargs: Any) -> Any:
            values = [materialized(value, self.budget) for value in args[skip:]]
            read = values[1:] if name in SHALLOW else values
            self.budget.weigh(*read, *kwargs.values())
            if growth is not None:
                growth(self.budget, *values, **kwargs)
            return small(function(*args[:skip], *values, **kwargs))

        return metered

    def _weighed(self, value: Any) -> Any:
        self.budget.weigh(value)
        return value

    def _searched(self, value: Any) -> Any:
        """The right side of `in`: a dict is not read through."""
        return value if isinstance(value, dict) else self._weighed(value)

    def _concat(self, values: list[Any]) -> str:
        self.budget.weigh(values)
        return "".join(map(str, values))

    def _slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        if isinstance(value, str | list | tuple):
            self.budget.spend(1 + len(value) // CHARS_PER_UNIT)
        return value[start:stop:step]

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers has it: no HTML escapes, unlike Jinja's own."""
        before = self.budget.left
        depth = self.budget.weigh(value)
        weight = before - self.budget.left
        width = indent if isinstance(indent, int) else len(indent or "")
        extra = max(0, width) * (depth + 1) + (len("".join(separators)) if separators else 0)
        self.budget.spend(weight * extra // CHARS_PER_UNIT)
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            check_ints(operator, left, right)
        elif operator == "+" and isinstance(left, str | list | tuple):
            self.budget.spend(units(left) + units(right))
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int):
                    self.budget.spend(units(text) * max(0, times))
        elif operator == "%" and isinstance(left, str):
            grow_format(self.budget, left, right)
        return small(super().call_binop(context, operator, left, right))

    def call(self, context: runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.spend(5)
        args = tuple(materialized(arg, self.budget) for arg in args)
        # The compiled code also hands the context its loop and block variables, under these names.
        named = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
        self._check_call(obj, args, named)
        if self._depth >= MAX_DEPTH:
            raise ChatTemplateError(f"the chat template nests calls more than {MAX_DEPTH} deep")
        self._depth += 1
        try:
            return super().call(context, obj, *args, **kwargs)
        finally:
            self._depth -= 1

    def _check_call(self, obj: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(obj, runtime.Macro | runtime.BlockReference | runtime.LoopContext | Joiner):
            return
        if isinstance(obj, runtime.Undefined):
            return  # calling it raises the error that names what is undefined
        self.budget.weigh(*args, *kwargs.values())
        if any(obj is function for function in self._functions):
            return
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        if not isinstance(method, BuiltinMethodType | MethodType):
            raise SecurityError(f"a {type(obj).__name__} cannot be called in a chat template")
        owner, name = method.__self__, method.__name__
        if not _is_allowed_method(owner, name):
            raise SecurityError(
                f"the method {name!r} of {type(owner).__name__} is not available in chat templates"
            )
        if not isinstance(owner, dict):  # whose methods do not look at the values
            self.budget.weigh(owner)
        growth = GROWTH.get(name) if isinstance(owner, str) else None
        if growth is not None and name == "join":
            growth(self.budget, *args, owner)
        elif growth is not None:
            growth(self.budget, owner, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int):
            self.budget.weigh(argument)  # hashing a tuple walks it
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(
            f"access to attribute {attribute!r} of a {type(obj).__name__} is not allowed"
        )


@jinja2.pass_context  # also keeps Jinja from evaluating constant output while compiling
def _finalize(context: runtime.Context, value: Any) -> Any:
    environment = context.environment
    assert isinstance(environment, MeteredEnvironment)
    environment.budget.weigh(value)
    return value


def _is_allowed_method(owner: Any, name: str) -> bool:
    for kind, names in (
        (str, _STR_METHODS),
        (dict, _DICT_METHODS),
        ((list, tuple), _LIST_METHODS),
        (runtime.LoopContext, _LOOP_METHODS),
    ):
        if isinstance(owner, kind):
            return name in names
    return False


def _range(*bounds: int) -> range:
    for bound in bounds:
        small(bound)
    return safe_range(*bounds)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 256 or re.search(r"%[-_0^#+]*\d", format):
        raise ChatTemplateError("strftime_now in the chat template: the format is not acceptable")
    return datetime.now().strftime(format)
