"""Make a data set of shards that others wrote: index, checksums and manifest in one pass; the tars are not changed."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("data_pipeline.index_shards")  # checks the options, runs main() and exits

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.progress import Progress
from data_pipeline.shards.provenance import refuse_made_otherwise, settings_of
from data_pipeline.shards.tar_index import scan
from data_pipeline.sources.filters import Filters
from data_pipeline.sources.tar_listing import Index, fetched_by_img2dataset, linked
from data_pipeline.sources.tars import contents, tar_rules, tars_in


def main(cfg: DictConfig) -> None:
    cfg.output = cfg.output or cfg.input
    if cfg.size < 1:
        raise UserError(f"size={cfg.size} must be 1 or more.")
    sizes = {name: storage.size(storage.join(cfg.input, name)) for name in tars_in(cfg.input)}
    filters = Filters(instantiate(cfg.filters, _convert_="all"))
    rules = tar_rules(cfg.key, cfg.unended)
    mark, settings = settings_digest(cfg, sizes), settings_of(OmegaConf.to_container(cfg, resolve=True))
    if finished(cfg.output, mark, settings):
        print(f"index_shards: {cfg.output} is finished already")
        return
    index = Index(cfg.output, filters, cfg.shard_in_keys, cfg.max_aside_fraction)
    shards, damaged, passed, fetched = [], [], 0, Counter()
    with Progress("index_shards", sum(sizes.values()) // 2**20, "MiB") as bar:
        for name, size in sizes.items():
            try:
                data = contents(storage.join(cfg.input, name))
                entries = scan(data, storage.join(cfg.input, name), rules)
                fetched += fetched_by_img2dataset(storage.join(cfg.input, name), len(entries))
            except DataError as error:  # all damaged tars are reported at the end, not one per run
                damaged.append(str(error))
                continue
            shards.append(index.add(linked(cfg.input, cfg.output, name), data, entries))
            passed += size
            if not damaged:
                index.refuse_too_many_rejects(sum(sizes.values()) / passed)
            bar.advance(passed // 2**20 - bar.done, aside=str(len(index.rejects.rows)))
    if damaged:
        raise DataError(f"{len(damaged)} of {len(sizes)} shards are damaged: {' '.join(damaged[:5])}")
    info = {"made_from": mark, "made_with": settings, "size": cfg.size}
    info |= {"img2dataset": dict(fetched)} if fetched else {}
    info |= {"tars": rules.as_info()} if rules.as_info() else {}
    index.finish([shard for shard in shards if shard.samples], info)
    if fetched:
        print(f"index_shards: img2dataset reports {fetched['successes']} of {fetched['count']} pictures downloaded")


def settings_digest(cfg: DictConfig, sizes: dict[str, int]) -> str:
    """What identifies a finished index: the configuration, and the tars' names and sizes."""
    config = OmegaConf.to_container(cfg, resolve=True) | {"output": None}
    for later in ("key", "unended"):  # while they are null, what was made before them stays finished
        if config[later] is None:
            del config[later]
    return hashlib.sha256(json.dumps([config, sizes], sort_keys=True).encode()).hexdigest()[:16]


def finished(output: str, mark: str, settings: Mapping[str, Any]) -> bool:
    """Whether the same configuration has made this output; an output of another configuration is refused."""
    if not storage.exists(storage.join(output, "manifest.json")):
        return False
    refuse_made_otherwise([output], f"{output}/manifest.json was", mark, settings)
    return True
