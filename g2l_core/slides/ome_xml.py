"""What the OME-XML in a TIFF says about its images.

The format: https://docs.openmicroscopy.org/ome-model/6.3.1/ome-tiff/specification.html and
https://www.openmicroscopy.org/Schemas/OME/2016-06 (Pixels, TiffData, UnitsLength).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from xml.etree import ElementTree

from g2l_core.errors import NotASlideError

PIXEL_SIZES = "PhysicalSizeX", "PhysicalSizeY"


@dataclass(frozen=True, kw_only=True)
class OmeImage:
    """One image of an OME-TIFF."""

    name: str
    size: tuple[int, int]
    """Width and height in pixels."""
    channels: int
    kind: str
    """The type of a sample: uint8, uint16, ..."""
    page: int
    """The number of the page that holds its first plane, in the file that the XML is in."""
    file: str = ""
    """The other file that its first plane is in; empty if it is this one."""
    properties: Mapping[str, str] = field(default_factory=dict)
    """ome.PhysicalSizeX and -Y, and ome.PhysicalSizeXUnit and -YUnit, as far as they are given."""


def is_ome_xml(description: str) -> bool:
    """Whether a description is OME-XML."""
    return description[-20:].rstrip("\0 \r\n").endswith("OME>")


def read_ome_xml(description: str, file_name: str) -> list[OmeImage]:
    """The images that OME-XML describes; none where it says that it is in another file (BinaryOnly).

    Args:
        description: The XML.
        file_name: The name of the file that it is in.

    Raises:
        NotASlideError: It is no XML, has a document type, or its images are not those of the format.
    """
    if "<!DOCTYPE" in description:
        raise NotASlideError("its OME-XML has a document type, which the format does not know; is it a slide?")
    try:
        root = ElementTree.fromstring(description.strip("\0 \r\n"))
        images = [image for image in root if _tag(image) == "Image"]
        return [image for element in images if (image := _image(element, root.get("UUID", ""), file_name))]
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise NotASlideError(f"its OME-XML is broken: {error!r}") from error


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _image(element: ElementTree.Element, uuid: str, file_name: str) -> OmeImage | None:
    pixels = next((child for child in element if _tag(child) == "Pixels"), None)
    if pixels is None:
        return None
    planes = [child for child in pixels if _tag(child) == "TiffData"]
    first = min(planes, key=_place, default=None)
    names = (*PIXEL_SIZES, *(f"{name}Unit" for name in PIXEL_SIZES))
    return OmeImage(
        name=element.get("Name") or element.get("ID") or "without a name",
        size=(int(pixels.attrib["SizeX"]), int(pixels.attrib["SizeY"])),
        channels=int(pixels.get("SizeC", "1")),
        kind=pixels.get("Type", "unknown"),
        page=int(first.get("IFD", "0")) if first is not None else 0,
        file=_other_file(first, uuid, file_name) if first is not None else "",
        properties={f"ome.{name}": pixels.attrib[name] for name in names if name in pixels.attrib},
    )


def _place(plane: ElementTree.Element) -> tuple[int, ...]:
    """Channel, depth, time and page of a plane."""
    return tuple(int(plane.get(name, "0")) for name in ("FirstC", "FirstZ", "FirstT", "IFD"))


def _other_file(plane: ElementTree.Element, uuid: str, file_name: str) -> str:
    """The name of the file that a plane is in; empty if it is the one with the XML, also under another name."""
    for child in plane:
        if _tag(child) == "UUID" and (child.text or "").strip() != uuid.strip():
            name = child.get("FileName", "")
            return "" if name == file_name else name or "another file"
    return ""
