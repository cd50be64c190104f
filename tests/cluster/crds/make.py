"""Make the schemas in this folder from KubeRay's CustomResourceDefinitions: python make.py ray.io_*.yaml"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml


def without_descriptions(node: Any, of_properties: bool = False) -> Any:
    """Drop descriptions, but not a property that is called so."""
    if isinstance(node, list):
        return [without_descriptions(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: without_descriptions(value, key == "properties" and not of_properties)
        for key, value in node.items()
        if of_properties or key != "description"
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        definition = yaml.load(Path(argument).read_text(), Loader=yaml.CSafeLoader)
        (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
        schema = without_descriptions(version["schema"]["openAPIV3Schema"])
        text = json.dumps(schema, sort_keys=True, separators=(",", ":"))
        target = Path(__file__).with_name(definition["spec"]["names"]["singular"] + ".json.gz")
        target.write_bytes(gzip.compress(text.encode(), mtime=0))
