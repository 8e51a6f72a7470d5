"""Which slide ids a store can hold: each is a path of folders below `slides/`."""

from collections.abc import Collection, Iterable

from g2l_core.store import schema

MAX_BYTES = 200
"""File systems allow 255 bytes a name, and the names of temporary files are longer than the names."""

_RESERVED = frozenset(
    {"", ".", "..", "c", "zarr.json", schema.PATCH_ID, schema.PATCH_LABELS, schema.FEATURES, *schema.TABLES}
)


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


def refusals(slide_ids: Iterable[str], stored: Collection[str]) -> dict[str, str]:
    """Why slides cannot be added to a store, by id; those that can, or are there, are not listed.

    A slide's folder holds its arrays, so no other slide can lie inside it, nor can it hold others.

    Args:
        slide_ids: Ids of slides in the order in which they would be added.
        stored: Ids of the slides that the store has.

    Example:
        >>> refusals(["a/x", "a", "a/y", "c"], ["b"])["a"]
        "there is a slide 'a/x' already, and no slide can lie inside another"
        >>> list(refusals(["b", "b/x", "coords"], ["b"]))
        ['b/x', 'coords']
    """
    taken = dict.fromkeys(stored)
    folders = {folder: slide_id for slide_id in stored for folder in folders_of(slide_id)}
    refused = {}
    for slide_id in slide_ids:
        if slide_id in taken:
            continue
        other = next((folder for folder in folders_of(slide_id) if folder in taken), folders.get(slide_id))
        reason = why_impossible(slide_id)
        if other is not None and not reason:
            reason = f"there is a slide {other!r} already, and no slide can lie inside another"
        if reason:
            refused[slide_id] = reason
        else:
            taken[slide_id] = None
            folders.update(dict.fromkeys(folders_of(slide_id), slide_id))
    return refused


def folders_of(slide_id: str) -> list[str]:
    """The folders that an id goes through, outermost first."""
    parts = slide_id.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]
