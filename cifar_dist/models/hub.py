"""Pretrained weights as local files, from the cache or downloaded."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import huggingface_hub
import torch
from huggingface_hub import constants

from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import make_folder
from cifar_dist.utils.network import RESPONSE_SECONDS, responds


def find_weights(cfg: Any, backbone: str) -> Path | None:
    """Return the cached file of the weights of timm's `cfg`, or None if it can be downloaded.

    Makes no network request for a cached file. Raises UserError within seconds if the server is
    unreachable, where the hub's client would retry for half a minute.
    """
    if cfg.hf_hub_id:
        repository, revision, names = _hub_files(cfg)
        for name in names:
            cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
            if isinstance(cached, str):
                return Path(cached)
        address = constants.ENDPOINT
    elif cfg.url:
        if (file := _torch_file(cfg)).is_file():
            return file
        address = cfg.url
    else:
        raise UserError(
            f"model.pretrained: timm has no weights for {backbone}; set model.weights=PATH "
            "or model.pretrained=false"
        )
    if constants.HF_HUB_OFFLINE or not is_reachable(address):
        raise _fetch_error(backbone, f"{urlparse(address).netloc} cannot be reached")
    return None


def fetch_weights(cfg: Any, backbone: str) -> Path:
    """Return the local file of the weights of timm's `cfg`, downloaded if it is not cached.

    Raises UserError as `find_weights` does, or if the download fails.
    """
    if cached := find_weights(cfg, backbone):
        return cached
    try:
        if not cfg.hf_hub_id:
            file = _torch_file(cfg)
            make_folder(file.parent)
            torch.hub.download_url_to_file(cfg.url, str(file), progress=False)
            return file
        repository, revision, names = _hub_files(cfg)
        available = set(huggingface_hub.list_repo_files(repository, revision=revision))
        name = next(name for name in names if name in available)
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
    except Exception as error:  # the hub's errors share no base class across its versions
        raise _fetch_error(backbone, f"the download failed ({error})") from error


def _hub_files(cfg: Any) -> tuple[str, str | None, tuple[str, ...]]:
    """Return repository, revision and the names to try on the hub."""
    repository, _, revision = cfg.hf_hub_id.partition("@")
    return repository, revision or None, weight_names(cfg.hf_hub_filename or "pytorch_model.bin")


def _torch_file(cfg: Any) -> Path:
    """Return where torch.hub stores the file of a URL."""
    return Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(cfg.url).path))


def _fetch_error(backbone: str, reason: str) -> UserError:
    return UserError(
        f"model.pretrained: the weights of {backbone} are not in the cache and {reason}; build this "
        f"model once on a machine with network and copy its cache ({constants.HF_HUB_CACHE}), or set "
        "model.weights=PATH, or model.pretrained=false"
    )


def is_reachable(address: str) -> bool:
    """Return whether the server of a URL answers within 3 seconds, through a proxy if one is set."""

    def request() -> None:
        with suppress(HTTPError):  # an HTTP error is an answer, too
            urlopen(Request(address, method="HEAD"), timeout=RESPONSE_SECONDS).close()

    return responds(request)


def weight_names(name: str) -> tuple[str, ...]:
    """Return the file names to try on the hub; like timm, safetensors before pickles."""
    safe = "model.safetensors" if name == "pytorch_model.bin" else f"{Path(name).stem}.safetensors"
    return (safe, name) if name.endswith(".bin") else (name,)
