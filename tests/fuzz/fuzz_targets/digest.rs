//! Fuzzes the decoder of digests.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::castore::digest(bytes);
});
