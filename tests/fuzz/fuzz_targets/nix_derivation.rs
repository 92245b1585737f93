//! Fuzzes the reader of Nix's derivations.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::nix::derivation_text(bytes);
});
