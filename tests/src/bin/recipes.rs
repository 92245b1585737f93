//! Follows the recipes of `docs/recipes.md`. Arguments name them; the default is all.

use std::env;

use anyhow::{Context, Result, bail};
use cofferdam_tests::recipes::RECIPES;

fn main() -> Result<()> {
    let asked: Vec<String> = env::args().skip(1).collect();
    let names = RECIPES.map(|recipe| recipe.name);
    if let Some(unknown) = asked.iter().find(|name| !names.contains(&name.as_str())) {
        bail!("there is no recipe {unknown:?}; there are {names:?}");
    }
    for recipe in RECIPES.iter().filter(|recipe| asked.is_empty() || asked.iter().any(|name| name == recipe.name)) {
        let took = recipe.follow().with_context(|| format!("the recipe {:?} failed", recipe.name))?;
        println!("{:<30} {:>6.1} s", recipe.name, took.as_secs_f64());
    }
    Ok(())
}
