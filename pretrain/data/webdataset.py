"""WebDataset tar shards, read at offsets: KEY.jpg with KEY.txt or KEY.json; KEY.{source,target}.png with KEY.json."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from core.failures import SampleError
from core.shards.tar import Member, MemberStream, list_shard, read_member
from core.text import parse_json
from pretrain.data.readers import Place, Reader, clean_texts

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_ABSENT = (-1, 0)


class WebDatasetReader(Reader):
    """A place is (offset, size) of every picture, then of KEY.json and KEY.txt; offset -1 for one that is absent."""

    def places(self, path: Path) -> Iterator[tuple[str, Place | SampleError]]:
        listing = list_shard(path)
        size = path.stat().st_size
        for key, members in listing.samples:
            yield key, self._place(key, members, size)
        if listing.cut:
            last = listing.samples[-1][0] if listing.samples else "its beginning"
            yield f"after {last}", SampleError(f"the shard is {listing.cut}; what followed is lost")

    def texts(self, path: Path, place: Place) -> tuple[str, ...]:
        record, text = self._text_members(path, place)
        values = {name: record.get(name) for name in self._texts}
        if text is not None and "caption" in values:
            values["caption"] = text
        return clean_texts(values)

    def pictures(self, path: Path, place: Place) -> tuple[IO[bytes], ...]:
        return tuple(
            MemberStream(path, Member(place[2 * i], place[2 * i + 1]))  # type: ignore[misc]
            for i in range(len(self._pictures))
        )

    def _place(self, key: str, members: dict[str, Member], shard_size: int) -> Place | SampleError:
        numbers: list[int] = []
        used = []
        for name in self._pictures:
            suffixes = [f"{name}.{extension}" for extension in EXTENSIONS]
            if name == "image":
                suffixes += EXTENSIONS
            found = [suffix for suffix in suffixes if suffix in members]
            if len(found) != 1:
                return SampleError(
                    f"{len(found)} pictures for field {name!r}: wants one of {key}.{suffixes[0]}, ..."
                )
            used.append(found[0])
        for suffix in (*used, "json", "txt"):
            member = members.get(suffix)
            if member and member.offset + member.size > shard_size:
                return SampleError(f"{key}.{suffix} is cut off at the end of the shard")
            numbers += (member.offset, member.size) if member else _ABSENT
        return tuple(numbers)

    def _text_members(self, path: Path, place: Place) -> tuple[dict[str, Any], str | None]:
        record: Any = {}
        text = None
        *_, json_offset, json_size, text_offset, text_size = place
        try:
            with open(path, "rb") as file:
                if json_offset >= 0:
                    record = parse_json(read_member(file, Member(json_offset, json_size), "its JSON"))
                if text_offset >= 0:
                    text = read_member(file, Member(text_offset, text_size), "its text").decode("utf-8-sig")
        except ValueError as error:  # JSON, UTF-8, and SampleError itself
            raise SampleError(f"its text cannot be read ({error})") from error
        if not isinstance(record, dict):
            raise SampleError("its JSON is not an object")
        return record, text
