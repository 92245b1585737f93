//! Fuzzes the decoder of directories and entries.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::castore::directory(bytes);
});
