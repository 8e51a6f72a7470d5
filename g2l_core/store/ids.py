"""Which slide ids a store can hold: each is a path of folders below `slides/`."""

from collections.abc import Collection

from g2l_core.store import schema

MAX_BYTES = 200
"""File systems allow 255 bytes a name, and the names of temporary files are longer than the names."""

_RESERVED = frozenset({"", ".", "..", "c", "zarr.json", schema.PATCH_ID, schema.FEATURES, *schema.TABLES})


def why_impossible(slide_id: str) -> str:
    """Why no store can hold a slide of this id; empty where one can."""
    if len(slide_id.encode(errors="surrogatepass")) > MAX_BYTES:
        return f"a slide_id has at most {MAX_BYTES} bytes, this one has {len(slide_id.encode(errors='surrogatepass'))}"
    strange = next((c for c in slide_id if c == "\\" or not c.isprintable()), None)
    if strange is not None:
        return f"a slide_id cannot contain {strange!r}"
    for part in slide_id.split("/"):
        if part in _RESERVED:
            return f"{part!r} cannot be a slide_id or a folder of one: the store uses that name itself"
        if part.endswith(schema.LEFTOVER) or part.startswith("c."):
            return f"{part!r} looks like one of the store's own files"
    return ""


def why_conflicting(slide_id: str, others: Collection[str]) -> str:
    """Why a slide of this id cannot stand beside others; empty where it can.

    A slide's folder holds its arrays, so no other slide can lie inside it, nor can it hold others.

    Args:
        slide_id: The id of a slide that is not among the others.
        others: Ids of slides; a set is fastest.
    """
    parts = slide_id.split("/")
    outer = next((above for i in range(1, len(parts)) if (above := "/".join(parts[:i])) in others), None)
    if outer is not None:
        return f"the store has a slide {outer!r}, and no slide can lie inside another"
    inner = next((other for other in others if other.startswith(f"{slide_id}/")), None)
    return "" if inner is None else f"the store has a slide {inner!r}, and no slide can lie inside another"
