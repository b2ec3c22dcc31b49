// How numbers are shown to people.
import Block
import Testing

@Suite struct WordingTests {
    @Test(arguments: [
        (0 as UInt64, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10 << 30, "10 GiB"),
        (UInt64.max, "16 EiB"),
    ])
    func bytesAreReadable(bytes: UInt64, text: String) { #expect(readable(bytes) == text) }

    @Test(arguments: [
        (1.005, 1, "1.0"), (0.95, 1, "1.0"), (-0.04, 1, "0.0"), (-1.25, 2, "-1.25"), (12.0, 0, "12"),
        (0.007, 3, "0.007"),
        (.infinity, 1, "inf"),
    ])
    func numbersHaveSoManyDecimals(value: Double, digits: Int, text: String) {
        #expect(decimals(value, digits) == text)
    }
}
