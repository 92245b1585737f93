//! Large amounts of bytes, files and builds.

use std::{fs, thread, time::Instant};

use cofferdam_tests::{
    Cofferdam,
    castore::{self, NodeText},
    slots,
};
use nix::sys::signal::Signal;

const MIB: u64 = 1 << 20;

/// Most memory of the program with its buffers, far less than the size of the outputs.
const MOST_RESIDENT_BYTES: u64 = 200 * MIB;

#[test]
fn a_gibibyte_of_output_needs_little_memory_of_the_host() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().output("build/large").flag("--needle", "0c5b8vw40dy178xlpddw65q9gf1h2186");
    let built = build.shell("truncate -s 1G large").succeeds();
    let peak_mib = built.peak_bytes / MIB;
    println!("1 GiB of output in {:.1} s; peak memory of the host process: {peak_mib} MiB", built.took.as_secs_f64());
    assert!(built.peak_bytes > 0 && built.peak_bytes < MOST_RESIDENT_BYTES, "peak: {peak_mib} MiB");

    let mut hasher = blake3::Hasher::new();
    let block = vec![0; MIB as usize];
    for _ in 0..1024 {
        hasher.update(&block);
    }
    let digest = data_encoding::BASE64.encode(hasher.finalize().as_bytes());
    assert_eq!(built.output().node, NodeText::printed(&format!("file:blake3-{digest}:{}", 1024 * MIB)));
}

#[test]
fn twenty_thousand_small_files_can_be_outputs() {
    let cofferdam = Cofferdam::new();
    let script = "for d in $(seq 100); do
                      mkdir -p many/$d
                      for f in $(seq 200); do echo $d-$f > many/$d/$f; done
                  done";
    let built = cofferdam.build().output("build/many").shell(script).succeeds();
    println!("20,000 files in {:.1} s; peak: {} MiB", built.took.as_secs_f64(), built.peak_bytes / MIB);
    assert!(built.peak_bytes < MOST_RESIDENT_BYTES, "peak: {} MiB", built.peak_bytes / MIB);

    let many = cofferdam.files().join("many");
    for directory in 1..=100 {
        fs::create_dir_all(many.join(directory.to_string())).unwrap();
        for file in 1..=200 {
            fs::write(many.join(format!("{directory}/{file}")), format!("{directory}-{file}\n")).unwrap();
        }
    }
    assert_eq!(built.output().node, castore::node_of(&many), "{built}");
}

#[test]
fn four_builds_at_once_share_a_store() {
    let cofferdam = Cofferdam::new();
    let shared = cofferdam.import(&cofferdam.file("shared", "for everyone\n"));
    let _all = slots::take_all();
    let begun = Instant::now();
    let mut builds: Vec<_> = (0..4)
        .map(|number| {
            let build = cofferdam.build().without_slot().input_node("shared", &shared).output("build/out").exported();
            build
                .start_shell(&format!("mkdir out; echo {number} > out/own; echo ready; sleep 5; cp /inputs/shared out"))
        })
        .collect();
    // Each host process is stopped in the middle of its command. The command needs the host for its input, so it waits.
    thread::scope(|scope| {
        for build in &builds {
            scope.spawn(|| build.wait_for("ready").signal(Signal::SIGSTOP));
        }
    });
    for build in &mut builds {
        assert!(build.is_alive(), "a build has ended before all had begun: {}", build.stderr_so_far());
    }
    for build in &builds {
        build.signal(Signal::SIGCONT);
    }
    for (number, build) in builds.into_iter().enumerate() {
        let built = build.end().succeeds();
        let out = built.exported("build/out");
        assert_eq!(fs::read_to_string(out.join("own")).unwrap(), format!("{number}\n"));
        assert_eq!(fs::read_to_string(out.join("shared")).unwrap(), "for everyone\n");
        assert_eq!(built.output().node, castore::node_of(&out));
    }
    println!("four builds at once in {:.1} s", begun.elapsed().as_secs_f64());
    cofferdam.verified_blobs();
}
