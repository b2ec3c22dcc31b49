// Big- and little-endian integers in raw memory: the one way bytes from outside become numbers.

extension UnsafeRawBufferPointer {
    /// The big-endian integer at a byte offset. Traps when it does not lie inside, so lengths are checked before.
    @inlinable @inline(__always)
    public func bigEndian<T: FixedWidthInteger>(_ offset: Int, as type: T.Type = T.self) -> T {
        T(bigEndian: loadUnaligned(fromByteOffset: offset, as: T.self))
    }

    /// The little-endian integer at a byte offset. Traps when it does not lie inside, so lengths are checked before.
    @inlinable @inline(__always)
    public func littleEndian<T: FixedWidthInteger>(_ offset: Int, as type: T.Type = T.self) -> T {
        T(littleEndian: loadUnaligned(fromByteOffset: offset, as: T.self))
    }
}

extension UnsafeMutableRawBufferPointer {
    /// Stores an integer big-endian at a byte offset. Traps when it does not fit.
    @inlinable @inline(__always)
    public func storeBigEndian<T: FixedWidthInteger>(_ value: T, at offset: Int) {
        storeBytes(of: value.bigEndian, toByteOffset: offset, as: T.self)
    }
}

extension [UInt8] {
    /// Appends an integer big-endian.
    @inlinable public mutating func appendBigEndian<T: FixedWidthInteger>(_ value: T) {
        Swift.withUnsafeBytes(of: value.bigEndian) { append(contentsOf: $0) }
    }
}
