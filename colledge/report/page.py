"""One offline HTML file: templates of this package, with Plotly's script inlined once and no request allowed."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from colledge.report.charts import Chart, drawable
from colledge.units import format_bytes, format_count, format_joules, format_seconds


def render_page(template: str, charts: Mapping[str, Chart], **values: object) -> str:
    """Return a page.

    Args:
        template: A file of this package that extends page.html.jinja.
        charts: The charts by the id of the element that each is drawn in; those with nothing to show are left out.
        values: What the template shows.
    """
    environment = Environment(
        loader=PackageLoader("colledge.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"seconds": format_seconds, "joules": format_joules}
    environment.filters |= {"bytes": format_bytes, "counted": format_count}
    page = environment.get_template(template)
    return page.render(charts=drawable(charts), plotly_script=get_plotlyjs(), **values)
