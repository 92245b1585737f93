//! Fuzzes the decoder of a stored chunk.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::castore::chunk(bytes);
});
