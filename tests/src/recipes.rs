//! The command lines of `docs/recipes.md`, with a project for each.
//!
//! ```text
//!   Debian's packages ─▶ debian.tar ──────────────────────────────┐   both in the user's cache
//!   tests/recipes/NAME ─▶ the first command, with the network ─┐  │
//!                        Debian's source package ──────────────┴──┴─▶ the last command: cofferdam run …
//! ```

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use cofferdam_images::{cache_dir, debian::Debian};

use crate::{debian_root, image, program, slots};

const DOCUMENT: &str = include_str!("../../docs/recipes.md");

/// What the document says that the root has, and what Debian's own images have beside it.
const PACKAGES: [&str; 23] = [
    "base-files",
    "bash",
    "cargo",
    "cmake",
    "coreutils",
    "dash",
    "diffutils",
    "findutils",
    "g++",
    "gawk",
    "gcc",
    "grep",
    "gzip",
    "hostname",
    "make",
    "npm",
    "perl-base",
    "python3-dev",
    "python3-pip",
    "python3-setuptools",
    "python3-wheel",
    "sed",
    "tar",
];

/// A section of the document.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// Its heading.
    pub name: &'static str,
    project: Project,
    /// What it leaves below `result`.
    makes: &'static str,
}

#[derive(Debug, Clone, Copy)]
enum Project {
    /// A directory of `tests/recipes`.
    Own(&'static str),
    /// A source package of Debian's.
    Debian(&'static str),
}

/// All of them, in the document's order.
pub const RECIPES: [Recipe; 7] = [
    Recipe { name: "make", project: Project::Own("make"), makes: "build/hello" },
    Recipe { name: "npm", project: Project::Own("npm"), makes: "build/dist/main.js" },
    Recipe { name: "pip", project: Project::Own("pip"), makes: "build/site/jinja2/__init__.py" },
    Recipe { name: "cargo", project: Project::Own("cargo"), makes: "build/target/debug/recipe" },
    Recipe { name: "CMake", project: Project::Debian("json-c"), makes: "build/made/libjson-c.a" },
    Recipe { name: "configure", project: Project::Debian("hello"), makes: "build/hello" },
    Recipe { name: "configure, from an input", project: Project::Debian("hello"), makes: "build/hello/hello" },
];

impl Recipe {
    /// Follows the recipe, and returns the time of its build.
    ///
    /// # Errors
    ///
    /// Something is missing on this machine, a command failed, or the result is not there.
    pub fn follow(&self) -> Result<Duration> {
        let blocks = blocks(self.name);
        let Some((build, fetch)) = blocks.split_last() else { bail!("docs/recipes.md has no recipe {:?}", self.name) };
        let directory = tempfile::tempdir()?;
        match self.project {
            Project::Own(name) => {
                let project = fetched(name, &fetch.concat())?;
                done(Command::new("cp").arg("-r").arg(project.join(".")).arg(directory.path()))?;
            }
            Project::Debian(package) => {
                let source = Debian::open(&cache_dir(), false, |line| eprintln!("  {line}"))?.source(package)?;
                debian_root::unpack_source(&source, directory.path())?;
            }
        }
        symlink(root()?, directory.path().join("debian.tar"))?;

        let program = program().parent().context("the program is in a directory")?;
        let path = format!("{}:{}", program.display(), env::var("PATH").unwrap_or_default());
        let mut shell = Command::new("sh");
        shell.args(["-ec", build]).current_dir(&directory).env("PATH", path).env("COFFERDAM_IMAGE", image().0);
        // The root stays in this store, since importing it takes longer than most recipes.
        shell.env("COFFERDAM_STATE_DIR", cache_dir().join("recipes/state"));
        let _slot = slots::take_one();
        let begun = Instant::now();
        done(&mut shell)?;
        let took = begun.elapsed();
        let made = directory.path().join("result").join(self.makes);
        ensure!(made.exists(), "{} was not made", self.makes);
        Ok(took)
    }
}

/// The indented blocks of a section of the document, without their indentation.
fn blocks(section: &str) -> Vec<String> {
    let lines = DOCUMENT.lines().skip_while(|line| line.strip_prefix("## ") != Some(section)).skip(1);
    let mut blocks: Vec<String> = Vec::new();
    let mut within = false;
    for line in lines.take_while(|line| !line.starts_with("## ")) {
        let code = line.strip_prefix("    ");
        if let Some(code) = code {
            if !within {
                blocks.push(String::new());
            }
            let block = blocks.last_mut().expect("there is one");
            block.push_str(code);
            block.push('\n');
        }
        within = code.is_some();
    }
    blocks
}

/// The image of the root, made once.
fn root() -> Result<PathBuf> {
    let debian = Debian::open(&cache_dir(), false, |line| eprintln!("  {line}"))?;
    let packages = debian.closure(&PACKAGES)?;
    let image = cache(&debian_root::identity(&packages), |staging| {
        let root = staging.join("root");
        debian_root::unpack(&packages, &root)?;
        debian_root::save(&root, &staging.join("debian.tar"))?;
        Ok(fs::remove_dir_all(root)?)
    })?;
    Ok(image.join("debian.tar"))
}

/// A project with its dependencies, fetched once.
fn fetched(name: &str, script: &str) -> Result<PathBuf> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes").join(name);
    let node = crate::castore::node_of(&project);
    cache(&format!("{node} {script}"), |staging| {
        done(Command::new("cp").arg("-r").arg(project.join(".")).arg(staging))?;
        let fetched = done(Command::new("sh").args(["-ec", script]).current_dir(staging));
        fetched.context("the dependencies can't be fetched; this needs the network, and `images/setup.sh test`")
    })
}

/// A directory in the user's cache, made once for each `identity`.
///
/// # Errors
///
/// `make` failed, or the cache can't be written.
pub fn cache(identity: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let place = cache_dir().join("recipes");
    fs::create_dir_all(&place)?;
    let lock = fs::File::create(place.join("lock"))?;
    lock.lock()?;
    let made = place.join(blake3::hash(identity.as_bytes()).to_hex().as_str());
    if !made.exists() {
        let staging = tempfile::tempdir_in(&place)?;
        make(staging.path())?;
        fs::rename(staging.keep(), &made)?;
    }
    Ok(made)
}

/// Runs a command to its end.
fn done(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("can't start {command:?}"))?;
    let told = [output.stdout, output.stderr].concat();
    ensure!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&told));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_of_the_document_is_followed() {
        let sections: Vec<_> = DOCUMENT.lines().filter_map(|line| line.strip_prefix("## ")).collect();
        let names: Vec<_> = ["The root"].into_iter().chain(RECIPES.iter().map(|recipe| recipe.name)).collect();
        assert_eq!(sections, names);
        for recipe in RECIPES {
            let blocks = blocks(recipe.name);
            let fetches = matches!(recipe.project, Project::Own(name) if name != "make");
            assert_eq!(blocks.len(), 1 + usize::from(fetches), "{}", recipe.name);
            assert!(
                blocks.last().is_some_and(|last| last.starts_with("cofferdam run --root docker-archive:debian.tar "))
            );
        }
    }
}
