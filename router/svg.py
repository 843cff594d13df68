"""A drawing as SVG text: the few shapes that a topology needs, in pixels from the upper left corner."""

from dataclasses import dataclass
from xml.etree import ElementTree

_FONT = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"
#: Width of a letter over its size, on average: text is not measured.
LETTER = 0.62


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle; x and y are its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """x of its right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """y of its lower edge."""
        return self.y + self.height

    def inset(self, by: float) -> "Box":
        """The box inside, `by` away from every edge."""
        return Box(x=self.x + by, y=self.y + by, width=self.width - 2 * by, height=self.height - 2 * by)


class Drawing:
    """Shapes in the order in which they are drawn; later ones cover earlier ones."""

    def __init__(self) -> None:
        self._root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": _FONT})
        marker = {"id": "head", "viewBox": "0 0 10 10", "refX": "9", "refY": "5", "orient": "auto-start-reverse"}
        marker |= {"markerWidth": "12", "markerHeight": "12", "markerUnits": "userSpaceOnUse"}
        head = ElementTree.SubElement(ElementTree.SubElement(self._root, "defs"), "marker", marker)
        ElementTree.SubElement(head, "path", {"d": "M 0 0 L 10 5 L 0 10 z", "fill": "#333"})

    def rect(
        self, box: Box, *, fill: str, stroke: str = "none", radius: float = 0, dashes: str = "", title: str = ""
    ) -> None:
        """A rectangle; `title` is what a viewer shows under the pointer."""
        names = {"x": box.x, "y": box.y, "width": box.width, "height": box.height, "rx": radius}
        attributes = {name: f"{value:.6g}" for name, value in names.items()} | {"fill": fill, "stroke": stroke}
        element = ElementTree.SubElement(self._root, "rect", attributes)
        if dashes:
            element.set("stroke-dasharray", dashes)
        if title:
            ElementTree.SubElement(element, "title").text = title

    def text(
        self,
        words: str,
        *,
        x: float,
        y: float,
        size: float,
        anchor: str = "start",
        color: str = "#222",
        bold: bool = False,
    ) -> None:
        """One line of text whose base line is at y; `anchor` is start, middle or end."""
        attributes = {"x": f"{x:.6g}", "y": f"{y:.6g}", "font-size": f"{size:.6g}", "fill": color}
        attributes |= {"text-anchor": anchor, "font-weight": "bold" if bold else "normal", "pointer-events": "none"}
        ElementTree.SubElement(self._root, "text", attributes).text = words

    def arrow(self, start: tuple[float, float], end: tuple[float, float], *, width: float = 1.5) -> None:
        """A line that leaves and arrives level, with a head at `end`."""
        middle = (start[0] + end[0]) / 2
        path = f"M {start[0]:.6g} {start[1]:.6g} C {middle:.6g} {start[1]:.6g} {middle:.6g} {end[1]:.6g} "
        attributes = {"d": f"{path}{end[0]:.6g} {end[1]:.6g}", "fill": "none", "stroke": "#333"}
        ElementTree.SubElement(
            self._root, "path", attributes | {"stroke-width": f"{width:.6g}", "marker-end": "url(#head)"}
        )

    def to_text(self, *, width: float, height: float) -> str:
        """The whole file, `width` x `height` pixels on white."""
        self._root.set("width", f"{width:.6g}")
        self._root.set("height", f"{height:.6g}")
        self._root.set("viewBox", f"0 0 {width:.6g} {height:.6g}")
        background = {"width": "100%", "height": "100%", "fill": "white"}
        self._root.insert(0, ElementTree.Element("rect", background))
        ElementTree.indent(self._root)
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(self._root, encoding="unicode")}\n'
