//! The log and the samples of a running build.

use std::fmt::Write;

use cofferdam_tests::Cofferdam;

#[test]
fn resource_use_is_sampled_about_once_a_second() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().host_variable("COFFERDAM_LOG", "cofferdam::build=debug");
    let script = "head -c 20971520 /dev/zero > file; (sleep 5; true) & sleep 5; wait";
    let built = build.shell(script).succeeds();
    let samples: Vec<_> = built.stderr.lines().filter(|line| line.contains("sample=Sample")).collect();
    let field = |sample: &str, field: &str| -> u64 {
        let value = sample.split_once(&format!("{field}: ")).unwrap().1;
        value.split_once(|c: char| !c.is_ascii_digit()).unwrap().0.parse().unwrap()
    };
    assert!(samples.len() >= 3, "{built}");
    for two in samples.windows(2) {
        let [earlier, later] = [two[0], two[1]].map(|sample| field(sample, "wall_us"));
        assert!(later - earlier > 500_000, "too many: {built}");
    }
    for (name, least) in [("wall_us", 1_000_000), ("scratch_bytes", 20 << 20), ("memory_bytes", 1), ("processes", 3)] {
        // The last sample may arrive after the command's end.
        let most = samples.iter().map(|sample| field(sample, name)).max();
        assert!(most >= Some(least), "{name}: {built}");
    }
}

#[test]
fn output_arrives_as_it_is_written_in_order_and_complete() {
    let cofferdam = Cofferdam::new();
    let mut running = cofferdam.build().start_shell(
        "echo early
         sleep 4
         seq 1 400000
         echo between >&2
         sleep 0.5
         echo late; echo 'without a newline' | tr -d '\\n'",
    );
    running.wait_for("early\n");
    assert!(running.is_alive() && !running.stderr_so_far().contains("1\n2\n"), "{}", running.stderr_so_far());
    let ended = running.end().succeeds();

    let mut numbers = String::new();
    for number in 1..=400_000 {
        writeln!(numbers, "{number}").unwrap();
    }
    let log = &ended.stderr;
    assert!(log.replace("between\n", "").contains(&numbers), "{} of {} bytes", log.len(), numbers.len());
    assert!(log.contains("between\n") && log.ends_with("late\nwithout a newline"));
    assert!(ended.json()["outputs"].as_array().is_none_or(Vec::is_empty), "{ended}");
}

#[test]
fn stdout_and_stderr_keep_their_order() {
    let lines: String = (0..500).map(|number| format!("{number}\n")).collect();
    let ended = Cofferdam::new()
        .build()
        .shell("n=0; while [ $n -lt 500 ]; do echo $n >&$((1 + n % 2)); n=$((n + 1)); done")
        .succeeds();
    assert!(ended.stderr.ends_with(&lines), "{ended}");
}
