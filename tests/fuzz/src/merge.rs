//! Chooses the fuzzer's inputs that are worth committing.
//!
//! A fuzzer keeps hundreds of inputs for each target, most of them for one new branch. A few inputs reach nearly all of the
//! code. The choice is greedy: the next input is always the one that adds the most code to the corpus.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{LIMITS, run};

/// Least number of new places for an input to be added.
const NEW_PLACES: usize = 4;

/// An input and the places in the program that it reaches.
struct Input {
    path: PathBuf,
    places: HashSet<u32>,
}

/// Copies the inputs worth keeping from `found` to `corpus`, and returns how many. `scratch` is for files on the way.
pub(crate) fn merge(program: &Path, corpus: &Path, found: &Path, scratch: &Path) -> Result<usize> {
    if scratch.exists() {
        fs::remove_dir_all(scratch)?;
    }
    let (merged, control) = (scratch.join("merged"), scratch.join("control"));
    fs::create_dir_all(&merged)?;
    // libFuzzer itself keeps too many, in `merged`. Its control file lists the places that each input reaches.
    let mut fuzzer = Command::new(program);
    fuzzer.args(LIMITS).args(["-merge=1", "-set_cover_merge=1", "-use_counters=0"]);
    fuzzer.arg(format!("-merge_control_file={}", control.display())).args([&merged, corpus, found]);
    run(fuzzer, &scratch.join("log"))?;
    let inputs = parse(&fs::read_to_string(&control)?).context("libFuzzer's control file has another format")?;
    let (committed, new): (Vec<_>, Vec<_>) = inputs.into_iter().partition(|input| input.path.starts_with(corpus));
    let chosen = choose(committed.into_iter().flat_map(|input| input.places).collect(), new);
    for path in &chosen {
        fs::copy(path, corpus.join(path.file_name().context("inputs are files")?))?;
    }
    Ok(chosen.len())
}

/// The control file: how many inputs there are, how many of them are in the first folder, their paths, and then a line
/// `FT`, the number of an input, its places, among other lines.
fn parse(control: &str) -> Option<Vec<Input>> {
    let mut lines = control.lines();
    let count = lines.next()?.parse().ok()?;
    lines.next()?;
    let mut inputs: Vec<_> =
        lines.by_ref().take(count).map(|path| Input { path: path.into(), places: HashSet::new() }).collect();
    for line in lines {
        if let Some(places) = line.strip_prefix("FT ") {
            let mut numbers = places.split_ascii_whitespace().map(str::parse);
            let input = inputs.get_mut(usize::try_from(numbers.next()?.ok()?).ok()?)?;
            input.places = numbers.collect::<Result<_, _>>().ok()?;
        }
    }
    Some(inputs)
}

fn choose(mut reached: HashSet<u32>, mut inputs: Vec<Input>) -> Vec<PathBuf> {
    let mut chosen = Vec::new();
    loop {
        for input in &mut inputs {
            input.places.retain(|place| !reached.contains(place));
        }
        inputs.retain(|input| input.places.len() >= NEW_PLACES);
        let Some(best) = (0..inputs.len()).max_by_key(|at| inputs[*at].places.len()) else { return chosen };
        let input = inputs.swap_remove(best);
        reached.extend(input.places);
        chosen.push(input.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_chosen_for_what_the_corpus_does_not_reach() {
        let control = "5\n0\n/corpus/a\n/found/b\n/found/c\n/found/d\n/found/e\n\
            STARTED 0 7\nFT 0 1 2 3 4\nCOV 0 1 2\nSTARTED 1 7\nFT 1 1 2 3 4 5 6 7\nCOV 1\n\
            FT 2 10 11 12 13 14\nFT 3 10 11 12 13 14 15\nFT 4 12 20 21 22 23\n";
        let mut inputs = parse(control).unwrap();
        let committed = inputs.remove(0);
        assert_eq!(committed.path, Path::new("/corpus/a"));
        // b reaches three new places, and c none beside those of d.
        assert_eq!(choose(committed.places, inputs), ["/found/d", "/found/e"].map(PathBuf::from));
    }
}
