//! One target: fuzzed, if this was compiled by `cofferdam-fuzz`; else run on files, as in
//! `cargo run --package cofferdam-fuzz --bin fuzz-target -- nar target/fuzz/findings/nar-crash-…`.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static TARGET: std::sync::LazyLock<cofferdam_fuzz::Target> = std::sync::LazyLock::new(|| {
        let name = std::env::var(cofferdam_fuzz::TARGET_VARIABLE).unwrap_or_default();
        cofferdam_fuzz::target(&name).unwrap_or_else(|| panic!("{} names no target", cofferdam_fuzz::TARGET_VARIABLE))
    });
    (TARGET.run)(bytes);
});

#[cfg(not(fuzzing))]
fn main() -> anyhow::Result<()> {
    use anyhow::Context as _;

    let mut args = std::env::args_os().skip(1);
    let name = args.next().context("name a target, and then files")?;
    let target = name.to_str().and_then(cofferdam_fuzz::target).with_context(|| format!("{name:?} is no target"))?;
    for file in args {
        let bytes = std::fs::read(&file).with_context(|| format!("can't read {file:?}"))?;
        let taken = if (target.run)(&bytes) { "is taken" } else { "is refused" };
        println!("{} {taken}", file.display());
    }
    Ok(())
}
