//! Fuzzes the decoder of tar archives, compressed or not.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::castore::tar(bytes);
});
