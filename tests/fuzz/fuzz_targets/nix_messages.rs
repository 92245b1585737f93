//! Fuzzes the decoders of Nix's worker protocol.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::nix::messages(bytes);
});
