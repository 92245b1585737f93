//! Follows the recipes of `docs/recipes.md`, and builds GNU hello with Nix. Arguments name them; the default is all.

use std::{env, time::Duration};

use anyhow::{Context, Result, bail};
use cofferdam_tests::{nix_hello, recipes::RECIPES};

type Follow = Box<dyn Fn() -> Result<Duration>>;

fn main() -> Result<()> {
    let asked: Vec<String> = env::args().skip(1).collect();
    let documented = RECIPES.into_iter().map(|recipe| (recipe.name, Box::new(move || recipe.follow()) as Follow));
    let all: Vec<_> = documented.chain([(nix_hello::NAME, Box::new(nix_hello::build) as Follow)]).collect();
    if let Some(unknown) = asked.iter().find(|asked| all.iter().all(|(name, _)| name != asked)) {
        let names: Vec<_> = all.iter().map(|(name, _)| name).collect();
        bail!("there is no recipe {unknown:?}; there are {names:?}");
    }
    for (name, follow) in all.iter().filter(|(name, _)| asked.is_empty() || asked.iter().any(|asked| asked == name)) {
        let took = follow().with_context(|| format!("the recipe {name:?} failed"))?;
        println!("{name:<30} {:>6.1} s", took.as_secs_f64());
    }
    Ok(())
}
