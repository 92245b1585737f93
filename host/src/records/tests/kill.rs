//! Processes that are killed at any moment while they write.

use std::{
    collections::HashMap,
    env,
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::{super::*, built, files, log_from, machine, open, request, tidy};

const DIR: &str = "COFFERDAM_TEST_RECORDS";

/// The test below runs this in processes that it kills. It prints a line after each step.
#[test]
fn record_where_a_variable_says() {
    let Some(dir) = env::var_os(DIR) else { return };
    let records = open(Path::new(&dir));
    let mut said = std::io::stdout();
    let mut say = |what: String| said.write_all(what.as_bytes()).and_then(|()| said.flush()).unwrap();
    say("\nready\n".to_owned());
    let mut running = Vec::new();
    for number in 0_u64.. {
        let recording = records.begin(request(&number.to_string()));
        recording.start(machine(), &[]).unwrap();
        say(format!("started {}\n", recording.id()));
        let line = format!("{} says {number}\n", recording.id()).repeat(1 + number as usize % 2000);
        recording.log(line.as_bytes()).unwrap();
        say(format!("logged {} {}\n", recording.id(), line.len()));
        running.push(recording);
        if number % 3 != 0 {
            let recording = running.remove(number as usize % running.len());
            recording.finish(built()).unwrap();
            say(format!("finished {}\n", recording.id()));
        }
    }
}

/// The output of a process that was killed after so many lines.
fn said_until_killed(dir: &Path, words: usize) -> Vec<String> {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "records::tests::kill::record_where_a_variable_says", "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut said: Vec<_> = lines.by_ref().skip_while(|line| line.as_ref().unwrap() != "ready").take(words).collect();
    child.kill().unwrap();
    said.extend(lines);
    child.wait().unwrap();
    let mut said: Vec<_> = said.into_iter().map(Result::unwrap).collect();
    said.pop_if(|last| last.split(' ').count() < 2);
    said
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, max_shrink_iters: 0, ..ProptestConfig::default() })]
    #[test]
    fn acknowledged_steps_survive_a_kill_and_open_builds_are_lost(words in 1..200_usize) {
        let dir = TempDir::new().unwrap();
        for words in [words, words.div_ceil(2)] {
            let mut known: HashMap<BuildId, (u64, bool)> = HashMap::new();
            for line in said_until_killed(dir.path(), words) {
                let mut line = line.split(' ');
                let (what, id) = (line.next().unwrap(), line.next().and_then(|id| id.parse().ok()));
                let Some(id) = id else { continue };
                match what {
                    "logged" => known.entry(id).or_default().0 = line.next().unwrap().parse().unwrap_or_default(),
                    "finished" => known.entry(id).or_default().1 = true,
                    _ => drop(known.entry(id).or_default()),
                }
            }
            let records = open(dir.path());
            for (id, (logged, is_finished)) in &known {
                let record = records.get(*id).unwrap().expect("it was started");
                // Only the last line may be missing.
                prop_assert!(!is_finished || record.status() == Status::Built, "{:?}", record);
                let log = log_from(&records, *id, 0);
                prop_assert!(log.len() as u64 >= *logged && log.len() as u64 == record.log.bytes, "{:?}", record);
                let text = format!("{id} says ");
                prop_assert!(String::from_utf8(log).unwrap().lines().all(|line| line.starts_with(&text)));
            }
            tidy(&records);
            let all = records.list(&|_| true, None, MAX_PAGE).unwrap();
            prop_assert!(all.records.iter().all(|record| record.status() != Status::Unfinished));
            let lost = all.records.iter().filter(|record| record.status() == Status::Failed).count();
            let unfinished = known.values().filter(|(_, is_finished)| !is_finished).count();
            prop_assert!(lost + 1 >= unfinished, "{} of {}", lost, unfinished);
            let packed: Vec<_> = files(dir.path());
            prop_assert!(packed.iter().all(|name| name.ends_with(".log.zst")), "{:?}", packed);
            prop_assert!(records.shared.database.plain().unwrap().is_empty());
        }
    }
}
