"""Recipes: the schema, the loader with its messages, what comes packaged, and how a recipe is started."""

from securetune.config.launch import Launch, read_launch
from securetune.config.loader import dump_recipe, load_recipe, parse_recipe, recipe_digest, recipe_json_schema
from securetune.config.packaged import recipes_folder
from securetune.config.schema import Recipe

__all__ = [
    "Launch",
    "Recipe",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "read_launch",
    "recipe_digest",
    "recipe_json_schema",
    "recipes_folder",
]
