//! Fuzzes the decoder of NAR archives.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::castore::nar(bytes);
});
