// What the disk below says of a range, told as a range of the disk above it: for chains and extents.
import Block

extension BlockDevice {
    /// Runs of data at least this long are looked at in the file below: a preallocated image has large ones that were
    /// never written. Shorter ones are not worth a system call each.
    static var dataLookedAtMin: UInt64 { 256 << 10 }

    /// Appends what this device says of a range, with its values changed.
    ///
    /// - Parameter start: the offset above that the range's start stands for.
    /// - Returns: the end, above, of what was appended; short when the list is full.
    func status(
        _ context: StatusContext, of range: Range<UInt64>, to start: UInt64, into list: inout StatusList,
        _ value: (UInt32) -> UInt32
    ) throws(BlockError) -> UInt64 {
        var below = StatusList(capacity: 256)
        var done: UInt64 = 0
        while done < range.count64 {
            below.removeAll()
            do throws(BlockError) {
                _ = try status(context, of: (range.lowerBound + done)..<range.upperBound, into: &below)
            } catch {
                // What comes before a fault is right.
                if done > 0 { return start + done }
                throw error
            }
            for extent in below.extents {
                if !list.append(extent.length, value(extent.value)) { return start + done }
                done += extent.length
            }
            if below.length == 0 { break }
        }
        return start + done
    }
}
