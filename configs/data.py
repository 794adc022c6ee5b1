"""What a YAML file may say of the data of a run: streams, their mixture, how they are read."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, model_validator

from shoal.configs.section import Count, Section

Weight = Annotated[float, Field(ge=0)]
_URL = re.compile(r"[a-z][a-z0-9+-]*:/")


def is_url(where: object) -> bool:
    """Whether shards are named by a URL, and so downloaded."""
    return isinstance(where, str) and bool(_URL.match(where))


class SampleConfig(Section):
    """Rows drawn, again and again, in the proportions of a domain's clusters."""

    clusters: str = Field(description="folder written by shoal cluster; the stream's path is that "
                          "of its generic corpus")  # fmt: skip
    domain: str = Field(description="name of a domain in it")
    temper: float = Field(
        1.0, ge=0, description="exponent of the weights; below 1 fewer rows are repeated"
    )


class Stream(Section):
    """Shards, and how much of the training is theirs: by weight, by epochs or by rows."""

    path: str = Field(
        description="folder of shards (one split) written by shoal prepare, or its URL, such as "
        "s3://bucket/corpus/train"
    )
    name: str | None = Field(None, description="None: the last two parts of the path")
    weight: Weight | None = Field(
        None, description="share of the rows, against the other weights; None: 1"
    )
    repeat: float | None = Field(None, gt=0, description="epochs of it in the whole run")
    choose: Count | None = Field(None, description="rows of it in the whole run")
    sample: SampleConfig | None = Field(
        None, description="importance sampling; None: each row once in every epoch"
    )

    @model_validator(mode="after")
    def _one_measure(self) -> Stream:
        given = {"weight": self.weight, "repeat": self.repeat, "choose": self.choose}
        named = [key for key, value in given.items() if value is not None]
        if len(named) > 1:
            raise ValueError(f"{self.label}: give one of {' and '.join(named)}")
        return self

    @property
    def label(self) -> str:
        """What metrics and schedules call it."""
        return self.name or "/".join(self.path.rstrip("/").split("/")[-2:])

    @property
    def is_counted(self) -> bool:
        """Whether the run takes a given number of its rows, whatever the other streams."""
        return self.repeat is not None or self.choose is not None

    @property
    def measure(self) -> float | str:
        """How much of it is read, as a checkpoint remembers it: the weight, or the other word."""
        if self.repeat is not None:
            return f"repeat {self.repeat:g}"
        return self.share if self.choose is None else f"choose {self.choose}"

    @property
    def share(self) -> float:
        """Its weight."""
        return 1.0 if self.weight is None else self.weight


class MixtureChange(Section):
    """Weights from a point of the run on, for example to anneal on a small domain."""

    from_tokens: int = Field(
        ge=0, description="training tokens before it, rounded up to a block of 1,024 rows"
    )
    weights: dict[str, Weight] = Field(
        min_length=1, description="by name of the stream; one that is left out is not read"
    )


class DataConfig(Section):
    """What a run reads."""

    train: tuple[Stream, ...] = Field(min_length=1)
    schedule: tuple[MixtureChange, ...] = Field((), description="weights that change on the way")
    validation: str | dict[str, str] | None = Field(
        None, description="folder of shards (one split), or several by name, each scored by itself"
    )
    document_mask: bool = Field(True, description="tokens see only their own document")
    shuffle_block_rows: Count | None = Field(
        None,
        description="rows of each of the 64 partitions that are shuffled with each other, so that "
        "few shards are in use at a time; None: all",
    )
    read_ahead_steps: int = Field(2, ge=0, description="steps read in the background")
    cache: str | None = Field(
        None, description="folder for shards read by URL; None: one in the user's cache folder"
    )
    cache_bytes: Count | None = Field(None, description="most bytes of that folder; None: no limit")
    download_seconds: float = Field(
        60, gt=0, description="without a byte for so long, a download has failed"
    )

    @property
    def local_folders(self) -> list[str]:
        """All folders of shards that are not named by a URL."""
        every = [*(stream.path for stream in self.train), *self.validations.values()]
        return [path for path in every if not is_url(path)]

    @property
    def validations(self) -> dict[str, str]:
        """Folders to validate on, by name."""
        if isinstance(self.validation, str):
            return {"validation": self.validation}
        return self.validation or {}

    @model_validator(mode="after")
    def _named_once(self) -> DataConfig:
        names = [stream.label for stream in self.train]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two streams are called {twice[0]}: give each a name")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> DataConfig:
        names = {stream.label for stream in self.train}
        if self.schedule and any(stream.is_counted for stream in self.train):
            raise ValueError("a schedule changes weights: leave repeat and choose out")
        starts = [change.from_tokens for change in self.schedule]
        if starts != sorted(set(starts)):
            raise ValueError("the entries of schedule must have rising from_tokens")
        for change in self.schedule:
            unknown = sorted(set(change.weights) - names)
            if unknown:
                raise ValueError(
                    f"schedule names {unknown[0]}, and the streams are {', '.join(sorted(names))}"
                )
            if not any(change.weights.values()):
                raise ValueError(f"from token {change.from_tokens} on all weights are 0")
        late = {
            name for change in self.schedule for name, weight in change.weights.items() if weight
        }
        for stream in self.train:
            if stream.weight == 0 and stream.label not in late:
                raise ValueError(f"{stream.label} has weight 0 and is never read")
        begins = not self.schedule or self.schedule[0].from_tokens > 0
        if begins and not any(s.is_counted or s.share for s in self.train):
            raise ValueError("all weights are 0 at the start of the run")
        return self
