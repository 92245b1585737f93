//! Fuzzes the decoder of the list of a blob's chunks.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::castore::chunk_list(bytes);
});
